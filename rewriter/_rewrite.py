"""rewrite: put the parametrizations of a spec into a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, overload

import torch
from torch import nn
from torch.export import ExportedProgram

from rewriter._attach import attach_sites, keep_parameters, take_off
from rewriter._copy import copied
from rewriter._given import check_model
from rewriter._pause import collector_paused
from rewriter.absorbing import Taken, take_over, taken_over
from rewriter.bindings import RewrittenModule, open_graph_owners, open_path, refuse_replaced
from rewriter.bindings.graph import lowered_model
from rewriter.capture import Call, call_for
from rewriter.context import Session
from rewriter.errors import RewriterError
from rewriter.language import Spec, load_spec
from rewriter.passes import OPTIONAL
from rewriter.planning._prepare import Prepared, prepare
from rewriter.sites import refuse_mixed
from rewriter.sites._places import SESSION


@overload
def rewrite(
    model: ExportedProgram,
    spec: Any,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    capture: str = "auto",
    inplace: bool = False,
    without: Collection[str] = (),
) -> ExportedProgram: ...


@overload
def rewrite(
    model: nn.Module,
    spec: Any,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    capture: str = "auto",
    inplace: bool = False,
    without: Collection[str] = (),
) -> nn.Module: ...


def rewrite(
    model: nn.Module | ExportedProgram,
    spec: Any,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    capture: str = "auto",
    inplace: bool = False,
    without: Collection[str] = (),
) -> nn.Module | ExportedProgram:
    """Return `model` with the parametrizations of `spec` in it.

    >>> import torch, rewriter
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    >>> spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
    >>> new = rewriter.rewrite(model, spec)
    >>> list(new.state_dict())
    ['0.bias', '0.parametrizations.weight.original']

    Each selected tensor is evaluated once per forward, however often it is used. Rewriting a rewritten model with
    the same spec changes nothing.

    Arguments:
        model: any module, a GraphModule, or an ExportedProgram, which gives an ExportedProgram.
        spec: a `Spec`, or anything `load_spec` takes.
        example_inputs: arguments of a call. A captured graph is compared with the model on them, and not used where
            it differs; ``capture="export"`` needs them.
        example_kwargs: keyword arguments of that call.
        dynamic_shapes: for ``capture="export"``, which sizes vary, as for `torch.export.export`.
        capture: ``"auto"`` traces the model and falls back to keeping its class where it cannot be traced;
            ``"graph"`` and ``"module"`` ask for one of the two. ``"export"`` goes through `torch.export` and rewrites
            the graph of ATen operations.
        inplace: reuse the model's own modules and Parameter objects, so that an optimizer stays valid. A model that
            was traced still comes back as a new module, over the same tensors.
        without: passes to leave out: any of ``"batch"``, ``"cast"``, ``"fuse"``, ``"hoist"``, ``"rows"`` and
            ``"transpose"``. They change how fast a model runs, and not what it computes.

    Raises:
        SpecError: the spec cannot be read.
        PlanError: the spec does not fit the model; the model is as it was.
        CaptureError: the capture asked for is not possible.
    """
    without = (without,) if isinstance(without, str) else without
    names = [step.name for step in OPTIONAL]
    unknown = set(without) - set(names)
    if unknown:
        raise RewriterError(f"without: {', '.join(sorted(unknown))} is none of {', '.join(names)}")
    read = spec if isinstance(spec, Spec) else load_spec(spec)
    check_model(model, "rewrite")
    call = call_for(model, capture, example_inputs, example_kwargs, dynamic_shapes)
    if isinstance(model, ExportedProgram):
        from rewriter.program import rewrite_program

        return rewrite_program(model, read, inplace=inplace)
    modules = list(model.modules())
    refuse_mixed(modules)
    for module in modules:
        if isinstance(module, RewrittenModule):
            refuse_replaced(module)
    with torch.inference_mode(False), collector_paused():
        if read.absorb:
            target, taken = _taken(model, read, capture, without, inplace, call)
        else:
            target, taken = model if inplace else copied(model), []
        return _rewrite(target, read, capture, without, taken, call)


def _taken(
    model: nn.Module, spec: Spec, capture: str, without: Collection[str], inplace: bool, call: Call | None
) -> tuple[nn.Module, list[Taken]]:
    if not inplace:
        return taken_over(model)
    # What does not fit shows on a copy, while the model is still as it was.
    copy, taken = taken_over(model)
    prepare(copy, spec, capture, taken=taken, call=call, without=without)
    return take_over(model)


def _rewrite(
    target: nn.Module,
    spec: Spec,
    capture: str,
    without: Collection[str],
    taken: Sequence[Taken],
    call: Call | None,
) -> nn.Module:
    prepared = prepare(target, spec, capture, taken=taken, call=call, without=without)
    if not prepared.new and not prepared.absorbed:
        return target
    closed = [module for module in target.modules() if SESSION not in module.__dict__]
    session = attach_sites(prepared)
    try:
        result = _rewrite_attached(target, prepared, session, without)
    except BaseException:
        take_off(prepared, closed)
        raise
    keep_parameters(prepared)
    return result


def _rewrite_attached(target: nn.Module, prepared: Prepared, session: Session, without: Collection[str]) -> nn.Module:
    fresh = [site for _, site in (*prepared.new, *prepared.absorbed)]
    in_place = prepared.capture.root == "module"
    if in_place:
        target = open_graph_owners(target)
    open_path(target, (name for site in fresh for name in site.record.names), session, itself=in_place)
    return target if in_place else _rewrite_graph(target, prepared, session, without)


def _rewrite_graph(root: nn.Module, prepared: Prepared, session: Session, without: Collection[str]) -> nn.Module:
    for name, tensor in prepared.capture.constants.items():
        root.register_buffer(name, tensor, persistent=False)
    captured = prepared.capture.graph
    assert captured is not None
    return lowered_model(root, captured, without)
