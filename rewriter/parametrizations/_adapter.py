"""What all adapters share: a base that is not trained, and a change of it by parameters of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations.maths._precision import Precise, wide_dtype, widen

FRESH = "a fresh adapter leaves the value as it is; the base (the original) is not trained"


class Adapter(Precise):
    """Add a change to a base that is not trained; what is added is all that an adapter has to say.

    The weight is seen as a matrix, all dimensions after the first flattened. An adapter made for a float16 or
    bfloat16 weight keeps its parameters in float32.

    Arguments:
        name: of the adapter, for errors.
        weight: the base.
    """

    guarantee = FRESH
    freezes_original = True

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__()
        self.rows, self.columns = matrix_shape(name, weight)

    def delta(self) -> Tensor:
        """Return what is added, as a matrix of ``rows x columns``."""
        raise NotImplementedError

    def drop(self, delta: Tensor) -> Tensor:
        """Return `delta` with what dropout leaves of it; called in train mode only."""
        return delta

    def value(self, X: Tensor) -> Tensor:
        delta = self.delta()
        if self.training:
            delta = self.drop(delta)
        return X + delta.reshape(X.shape)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the base: `value` without the change; `value` itself while the change is zero."""
        return (widen(value) - self.delta().reshape(value.shape)).to(value.dtype)


def matrix_shape(name: str, weight: Tensor) -> tuple[int, int]:
    """Return rows and columns of the weight as a matrix.

    Raises:
        RewriterError: it has fewer than two dimensions.
    """
    if weight.dim() < 2:
        raise RewriterError(f"{name} adapts weights of two or more dimensions, this one has shape {list(weight.shape)}")
    return weight.shape[0], weight.shape[1:].numel()


def require_rank(name: str, r: int) -> None:
    """Raise RewriterError unless `r` is positive."""
    if r < 1:
        raise RewriterError(f"{name} needs a rank r of one or more, not {r}")


def zeros(weight: Tensor, shape: Sequence[int]) -> nn.Parameter:
    """Return a parameter of zeros at the weight's place, in float32 where the weight is narrower."""
    return nn.Parameter(torch.zeros(tuple(shape), dtype=wide_dtype(weight.dtype), device=weight.device))


def kaiming(weight: Tensor, shape: Sequence[int]) -> nn.Parameter:
    """Return a parameter drawn as ``nn.Linear`` draws its weight (uniform, fan in, a = sqrt 5)."""
    parameter = zeros(weight, shape)
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    return parameter


def normal(weight: Tensor, shape: Sequence[int], std: float = 1.0) -> nn.Parameter:
    """Return a parameter of normal entries."""
    parameter = zeros(weight, shape)
    nn.init.normal_(parameter, std=std)
    return parameter


def kept_rows(rows: int, p: float, rescaled: bool, like: Tensor) -> Tensor:
    """Return a column of ones and zeros, zero with probability `p`; divided by its mean where `rescaled`."""
    mask = (torch.rand(rows, 1, device=like.device) > p).to(like.dtype)
    return mask / mask.mean().clamp_min(1 / (2 * rows)) if rescaled else mask
