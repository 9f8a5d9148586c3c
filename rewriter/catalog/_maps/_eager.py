"""Whether the values of a tensor may be looked at to choose a faster way."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def readable(X: Tensor) -> bool:
    """Return whether ``X`` holds numbers now, rather than standing for numbers of a later run.

    A choice that depends on values must not be baked into a compiled, exported or traced program, and cannot be
    made for a fake tensor or inside ``torch.func`` transforms.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or isinstance(X, FakeTensor)
        or X.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(X)
        or X.numel() == 0
        or (torch._C._len_torch_dispatch_stack() > 0 and _is_recorded())
    )


def _is_recorded() -> bool:
    """Whether what reaches torch's dispatcher is written down, as `make_fx` does."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def at_hand(X: Tensor) -> bool:
    """Return whether the numbers of ``X`` are :func:`readable` and reading one waits for no device."""
    return X.is_cpu and readable(X)
