"""Parametrizations of other libraries, computed in at least float32."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rewriter.parametrizations._base import WideBuffers
from rewriter.parametrizations.maths._precision import widen


class Widened(WideBuffers):
    """First base of a class whose `forward` shall compute in at least float32.

    Decompositions have no bfloat16, and a product of bfloat16 matrices is not orthogonal.
    """

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the value of the inputs, in the dtype of the last one."""
        dtype = _dtype_of(inputs)
        return _converted(super().forward(*_widened(inputs), **named), dtype)


class WidenedBothWays(Widened):
    """First base of a class that has a right inverse too."""

    def right_inverse(self, value: Any, **named: Any) -> Any:
        """Return the inputs for `value`, in its dtype."""
        return _converted(super().right_inverse(_widened(value), **named), _dtype_of(value))  # type: ignore[misc]


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return widen(value)
    return type(value)(map(_widened, value)) if isinstance(value, (tuple, list)) else value


def _converted(value: Any, dtype: Any) -> Any:
    if isinstance(value, Tensor):
        return value if dtype is None or value.dtype == dtype else value.to(dtype)
    return type(value)(_converted(part, dtype) for part in value) if isinstance(value, (tuple, list)) else value


def _dtype_of(value: Any) -> Any:
    """Return the dtype of the last tensor if `widen` converts it, else ``None``."""
    while isinstance(value, (tuple, list)):
        value = value[-1] if value else None
    return value.dtype if isinstance(value, Tensor) and widen(value) is not value else None
