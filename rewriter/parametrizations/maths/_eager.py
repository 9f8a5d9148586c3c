"""Conditions under which code may read the values of a tensor to choose a faster path."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

_SYMBOLS = (FakeTensor, FunctionalTensor)
_interpreter = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state


def readable(X: Tensor) -> bool:
    """Return whether ``X`` has values now, and is no symbol for values of a later run.

    A choice that depends on values must not be baked into a compiled, exported or traced program, and cannot be
    made for a fake tensor or inside ``torch.func`` transforms.
    """
    return not (
        is_compiling()
        or _tracing_state() is not None
        or isinstance(X, _SYMBOLS)
        or X.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(X)
        or X.numel() == 0
        or (_dispatch_modes() > 0 and _is_recorded())
    )


def _is_recorded() -> bool:
    """Return whether a mode records the operations, as `make_fx` does."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def executed_now() -> bool:
    """Return whether operations on plain tensors run as they are called, without tracing or transforms.

    Then code may read a number of a tensor on the CPU without waiting, and no forward-mode derivative is wanted.
    """
    return not (
        is_dynamo_compiling()  # other compilers have fake tensors, or modes on
        or _interpreter() is not None
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or (_dispatch_modes() > 0 and _is_recorded())
    )


def at_hand(X: Tensor) -> bool:
    """Return whether the numbers of ``X`` are :func:`readable` without waiting for a device."""
    return X.is_cpu and readable(X)
