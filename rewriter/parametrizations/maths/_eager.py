"""Conditions under which code may read the values of a tensor to choose a faster path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from rewriter._torch import (
    FakeTensor,
    FunctionalTensor,
    dispatch_modes,
    forward_ad,
    functorch_interpreter,
    is_functorch_tensor,
    tracing_state,
)
from rewriter.errors import RewriterError

_SYMBOLS = (FakeTensor, FunctionalTensor)
KINDS = frozenset({Tensor, nn.Parameter})
"""The classes whose tensors a node of the autograd graph may take apart: no subclass."""
DTYPES = frozenset({torch.float32, torch.float64})
"""The dtypes that such nodes compute in."""
Together = Callable[[], Sequence[Tensor] | None]
"""What `Parametrization.together` returns."""


def readable(X: Tensor) -> bool:
    """Return whether ``X`` has values now, and is no symbol for values of a later run.

    A choice that depends on values must not be baked into a compiled, exported or traced program, and cannot be
    made for a fake tensor or inside ``torch.func`` transforms.
    """
    return not (
        is_compiling()
        or tracing_state() is not None
        or isinstance(X, _SYMBOLS)
        or X.is_meta
        or is_functorch_tensor(X)
        or X.numel() == 0
        or (dispatch_modes() > 0 and _is_recorded())
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
        or functorch_interpreter() is not None
        or tracing_state() is not None
        or forward_ad._current_level >= 0
        or (dispatch_modes() > 0 and _is_recorded())
    )


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply``, for where :func:`executed_now` is true, without the look for torch.func's tensors.

    That look takes as long for one tensor as an operation on a small one.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def at_hand(X: Tensor) -> bool:
    """Return whether the numbers of ``X`` are :func:`readable` without waiting for a device."""
    return X.is_cpu and readable(X)


def overwrite(buffer: Tensor, value: Tensor) -> None:
    """Write `value` into a buffer, also where a transform of torch.func was not given the buffer.

    Raises:
        RewriterError: vmap has a value for each example, and one buffer.
    """
    if is_compiling() or functorch_interpreter() is None or is_functorch_tensor(buffer):
        buffer.copy_(value)
        return
    try:
        torch.add(value, 0, out=buffer)  # copy_ refuses what the transform captured
    except RuntimeError as problem:
        raise RewriterError(
            "a buffer that advances in train mode has one value, and vmap computes one for each example: give "
            "functional_call the buffers too, stacked as torch.func.stack_module_state does, or call eval() before"
        ) from problem
