"""Whether plain execution is going on, and whose tracer of torch.fx is at work."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

own: set[object] = set()
"""The tracers of this package that are at work: they know what a computed tensor is."""

_dispatch_modes = torch._C._len_torch_dispatch_stack
_interpreter = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
_graph_task = torch._C._current_graph_task_id
_autocast = torch._C._is_any_autocast_enabled


def ordinary() -> bool:
    """Whether what is called now is executed as it is written, and no backward runs: as nearly always."""
    return not (
        is_dynamo_compiling()  # the other cases of `is_compiling` run under modes
        or _autocast()
        or _graph_task() != -1
        or _dispatch_modes() > 0
        or _interpreter() is not None
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or is_fx_symbolic_tracing()
    )


def others_trace() -> bool:
    """Whether somebody else's tracer takes what is computed now for a constant.

    Those that go by what reaches torch's dispatcher (`make_fx`, `torch.export`) do not.
    """
    return is_fx_symbolic_tracing() and not own and not _dispatch_modes()


def autocast_anywhere() -> bool:
    """Say whether autocast may be on for some device."""
    # Asking for one device needs the device; most forwards run without autocast and should not pay for finding it.
    return torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()


def as_autocast(value: Any) -> Any:
    """Return a value, or several, in the precision of autocast."""
    if isinstance(value, tuple):
        return tuple(map(as_autocast, value))
    kind = value.device.type
    if value.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return value
    return value.to(torch.get_autocast_dtype(kind))
