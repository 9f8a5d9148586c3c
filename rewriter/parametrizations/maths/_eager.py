"""Whether the values of a tensor may be looked at to choose a faster way."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

_interpreter = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state


def readable(X: Tensor) -> bool:
    """Return whether ``X`` holds numbers now, rather than standing for numbers of a later run.

    A choice that depends on values must not be baked into a compiled, exported or traced program, and cannot be
    made for a fake tensor or inside ``torch.func`` transforms.
    """
    return not (
        is_compiling()
        or _tracing_state() is not None
        or isinstance(X, FakeTensor)
        or X.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(X)
        or X.numel() == 0
        or (_dispatch_modes() > 0 and _is_recorded())
    )


def _is_recorded() -> bool:
    """Whether what reaches torch's dispatcher is written down, as `make_fx` does."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def executed_now() -> bool:
    """Return whether operations on plain tensors are executed as they are called, and by nobody else's rules.

    Then a number of a tensor on the CPU may be read, which waits for nothing; and no forward-mode derivative is wanted.
    """
    return not (
        is_dynamo_compiling()  # other compilers have fake tensors, or modes on
        or _interpreter() is not None
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or (_dispatch_modes() > 0 and _is_recorded())
    )


def at_hand(X: Tensor) -> bool:
    """Return whether the numbers of ``X`` are :func:`readable` and reading one waits for no device."""
    return X.is_cpu and readable(X)
