"""capture="export": the whole graph of a model in ATen operations, for train and eval mode at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.export import ExportedProgram

from rewriter.capture._capture import Capture
from rewriter.capture._examples import Call, difference
from rewriter.capture._merge import Differs, Merging
from rewriter.capture._reason import export_reason
from rewriter.errors import CaptureError


def export_capture(model: nn.Module, call: Call | None) -> Capture:
    """Capture the forward of `model` by torch.export.

    Raises:
        CaptureError: there are no example inputs, torch.export cannot capture the model, or its graph is not the model.
    """
    if call is None:
        raise CaptureError("capture='export' runs the model: give example_inputs (or example_kwargs)")
    mode = model.training
    own = _exported(model, call, mode)
    why = ""
    try:
        other = _exported(model, call, not mode)
        pair = (own, other) if mode else (other, own)
        merged = Merging(model, call, own)
        graph = merged.graph_of(pair[0], pair[1])
    except (CaptureError, Differs) as problem:
        why = f"{'train' if mode else 'eval'} mode only: {problem}"
        merged = Merging(model, call, own)
        graph = merged.graph_of(own, None)
    way = Capture("export", graph, why, constants=merged.constants)
    _check(model, way, call, [mode] if why else [True, False])
    return way


def _exported(model: nn.Module, call: Call, training: bool) -> ExportedProgram:
    modes = {module: module.training for module in model.modules()}
    try:
        if training != model.training:
            model.train(training)
        return torch.export.export(
            model, tuple(call.args), dict(call.kwargs), dynamic_shapes=call.dynamic_shapes, strict=False
        )
    except Exception as problem:
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {export_reason(problem)}; "
            "capture='module' needs no graph"
        ) from problem
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check(model: nn.Module, way: Capture, call: Call, modes: Sequence[bool]) -> None:
    assert way.graph is not None
    for name, tensor in way.constants.items():
        model.register_buffer(name, tensor, persistent=False)
    former = model.training
    try:
        for training in modes:
            if training and not former:
                continue
            text = difference(model, way.graph, call, training=training)
            if text:
                raise CaptureError(f"the graph that torch.export captured is not the model: {text}")
    finally:
        for name in way.constants:
            del model._buffers[name]
            model._non_persistent_buffers_set.discard(name)
