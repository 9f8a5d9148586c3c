"""One call of a model, to capture it with or to compare a captured graph on."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from rewriter._given import kind_of
from rewriter._torch import pytree
from rewriter.context._random import nothing_drawn
from rewriter.errors import CaptureError

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Call:
    """Example arguments.

    Arguments:
        args: positional ones.
        kwargs: keyword ones.
        dynamic_shapes: which sizes vary, as for `torch.export.export`.
    """

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None


def call_for(
    model: nn.Module | ExportedProgram,
    capture: str,
    example_inputs: Tensor | Sequence[Any] | None,
    example_kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
) -> Call | None:
    """Return the example call, if one is given.

    Raises:
        CaptureError: there is no such way of capturing, not for this kind of model, or not with these arguments.
    """
    if capture not in ("auto", "graph", "module", "export"):
        raise CaptureError(f"capture is 'auto', 'graph', 'module' or 'export', not {capture!r}")
    call = given_call(example_inputs, example_kwargs, dynamic_shapes)
    if isinstance(model, ExportedProgram):
        if capture not in ("auto", "export"):
            raise CaptureError(f"an ExportedProgram is a captured graph already: capture is 'auto', not {capture!r}")
        if call is not None or dynamic_shapes is not None:
            raise CaptureError("an ExportedProgram is a captured graph already: it takes no examples and no sizes")
    if dynamic_shapes is not None and (capture != "export" or call is None):
        raise CaptureError("dynamic_shapes says what varies for torch.export: capture='export', with example_inputs")
    return call


def given_call(args: Any, kwargs: Any, dynamic_shapes: Any = None) -> Call | None:
    """Return the call that `example_inputs` and `example_kwargs` mean; a tensor is the only argument.

    Raises:
        CaptureError: they are of another form.
    """
    if args is None and kwargs is None:
        return None
    if not isinstance(args, (Tensor, tuple, list, type(None))):
        raise CaptureError(
            f"example_inputs is a tensor, or the tuple of the forward's positional arguments, not {kind_of(args)}; "
            "arguments by name are example_kwargs={…}"
        )
    if not isinstance(kwargs, (Mapping, type(None))):
        raise CaptureError(f"example_kwargs maps names of arguments to their values; it is {kind_of(kwargs)}")
    args = (args,) if isinstance(args, Tensor) else tuple(args or ())
    return Call(args, dict(kwargs or {}), dynamic_shapes)


def difference(model: nn.Module, graph: fx.Graph, call: Call, *, training: bool = False) -> str:
    """Say how the graph's outputs differ from the model's on one call; empty where they do not.

    Neither the model's buffers and modes nor the state of the random number generators change.

    Raises:
        CaptureError: the model itself fails.
    """
    with _unchanged(model) as put_back, torch.no_grad():
        for module in model.modules():
            module.training = module.training and training
        seed = torch.get_rng_state()
        args, kwargs = pytree.tree_map(_cloned, (tuple(call.args), dict(call.kwargs)))
        try:
            expected = model(*args, **kwargs)
        except Exception as problem:
            reason = str(problem).strip().partition("\n")[0]
            raise CaptureError(
                f"the model fails on the example inputs: {type(problem).__name__}: {reason}"
            ) from problem
        torch.set_rng_state(seed)
        written = {name: buffer.clone() for name, buffer in model.named_buffers()}
        put_back()
        captured = fx.GraphModule(model, copy.deepcopy(graph))
        args, kwargs = pytree.tree_map(_cloned, (tuple(call.args), dict(call.kwargs)))
        try:
            found = captured.forward(*args, **kwargs)
        except CaptureError:
            raise
        except Exception as problem:
            return f"it fails: {type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
        for name, buffer in model.named_buffers():
            text = _differs(written[name], buffer)
            if text:
                return f"{name}, which it writes to, {text}"
    before, after = pytree.tree_flatten(expected), pytree.tree_flatten(found)
    if len(before[0]) != len(after[0]):
        return f"it returns {len(after[0])} values where the model returns {len(before[0])}"
    for one, other in zip(before[0], after[0], strict=True):
        text = _differs(one, other)
        if text:
            return f"its output {text}"
    return ""


def _differs(one: Any, other: Any) -> str:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return "" if type(one) is type(other) and (one is other or one == other) else f"is {other!r} instead of {one!r}"
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return f"is {other.dtype}{list(other.shape)} instead of {one.dtype}{list(one.shape)}"
    tolerance = _TOLERANCE.get(one.dtype, 0.0)
    if one.is_meta or torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True):
        return ""
    return f"differs by {float((one - other).abs().max()):.1e}"


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put modes, buffers and random state back at the end; the buffers also when what is given is called."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    with nothing_drawn((*model.parameters(), *model.buffers())):

        @torch.no_grad()
        def put_back() -> None:
            for buffer, former in buffers.items():
                if not buffer.is_meta and not torch.equal(buffer, former):
                    buffer.copy_(former)

        try:
            yield put_back
        finally:
            for module, training in modes.items():
                module.training = training
            put_back()


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
