"""Whether torch.fx is tracing, and on whose behalf."""

from __future__ import annotations

import torch
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

own: set[object] = set()
"""The tracers of this package that are at work: they know what a computed tensor is."""

_dispatch_modes = torch._C._len_torch_dispatch_stack


def others_trace() -> bool:
    """Whether somebody else's tracer takes what is computed now for a constant.

    Those that go by what reaches torch's dispatcher (`make_fx`, `torch.export`) do not.
    """
    return is_fx_symbolic_tracing() and not own and not _dispatch_modes()
