"""Whether plain execution is going on, and whose tracer of torch.fx is at work."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from rewriter._torch import (
    autocast_on,
    current_backward,
    dispatch_modes,
    forward_ad,
    functorch_interpreter,
    is_fx_symbolic_tracing,
    tracing_state,
)

own: set[object] = set()
"""The tracers of this package that are at work: they know what a computed tensor is."""


def ordinary() -> bool:
    """Whether what is called now is executed as it is written, and no backward runs: as nearly always."""
    return not (
        is_dynamo_compiling()  # the other cases of `is_compiling` run under modes
        or autocast_on()
        or current_backward() != -1
        or dispatch_modes() > 0
        or functorch_interpreter() is not None
        or forward_ad._current_level >= 0
        or tracing_state() is not None
        or is_fx_symbolic_tracing()
    )


def plain_autograd() -> bool:
    """Whether autograd records what is called now, perhaps for torch.compile: nothing else traces or transforms."""
    if is_dynamo_compiling():
        return torch.is_grad_enabled() and not torch.compiler.is_exporting()
    return torch.is_grad_enabled() and not (torch.compiler.is_compiling() or traced() or is_fx_symbolic_tracing())


def traced() -> bool:
    """Whether torch.jit.trace, a transform of torch.func or forward mode sees what is called now."""
    return functorch_interpreter() is not None or forward_ad._current_level >= 0 or tracing_state() is not None


def others_trace() -> bool:
    """Whether somebody else's tracer takes what is computed now for a constant.

    Those that go by what reaches torch's dispatcher (`make_fx`, `torch.export`) do not.
    """
    return is_fx_symbolic_tracing() and not own and not dispatch_modes()


def autocast_anywhere() -> bool:
    """Say whether autocast may be on for some device."""
    # Asking for one device needs the device; most forwards run without autocast and should not pay for finding it.
    return torch.compiler.is_compiling() or autocast_on()


def as_autocast(value: Any) -> Any:
    """Return a value, or several, in the precision of autocast."""
    if isinstance(value, tuple):
        return tuple(map(as_autocast, value))
    kind = value.device.type
    if value.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return value
    return value.to(torch.get_autocast_dtype(kind))
