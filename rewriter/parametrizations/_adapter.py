"""The bases of adapters: a base weight that is not trained, and a change of it by trained parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Precise
from rewriter.parametrizations.maths._precision import wide_dtype, widen

FRESH = "a new adapter does not change the value; the base (the original) is not trained"


class Frozen(Precise):
    """A change of a base that is not trained.

    The weight is seen as a matrix ``out x (in · ...)``, all dimensions after the first flattened. Parameters are
    float32 for a float16 or bfloat16 weight.
    """

    guarantee = FRESH
    cost = "O(r · entries)"
    freezes_original = True
    least_dims = 2

    def build(self, weight: Tensor) -> None:
        if weight.dim() < self.least_dims:
            raise RewriterError(
                f"{self.name} adapts weights of two or more dimensions, this one has shape {list(weight.shape)}; "
                "leave biases out with `tensor: weight` in the selector"
            )
        self.rows, self.columns = (weight.shape[0] if weight.dim() else 0), weight.shape[1:].numel()
        r = getattr(self, "r", 1)
        if r < 1:
            raise RewriterError(f"{self.name} needs a rank r of one or more, not {r}")
        self.start(weight)

    def start(self, weight: Tensor) -> None:
        """Check the arguments and make the parameters of a new adapter."""

    def zeros(self, *shape: int) -> nn.Parameter:
        """Return a parameter of zeros on the weight's device, at least float32."""
        return nn.Parameter(torch.zeros(shape, dtype=wide_dtype(self.dtype), device=self.device))

    def kaiming(self, *shape: int) -> nn.Parameter:
        """Return a parameter with the distribution of the weight of ``nn.Linear`` (uniform, fan in, a = sqrt 5)."""
        parameter = self.zeros(*shape)
        nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        return parameter


class Adapter(Frozen):
    """An adapter that adds `delta`, a matrix, to the base."""

    def delta(self) -> Tensor:
        """Return the change, as a matrix of ``rows x columns``."""
        raise NotImplementedError

    def drop(self, delta: Tensor) -> Tensor:
        """Return `delta` after dropout; called in train mode only."""
        return delta

    def value(self, X: Tensor) -> Tensor:
        delta = self.delta()
        if self.training:
            delta = self.drop(delta)
        return X + delta.reshape(X.shape)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the base: `value` without the change."""
        return (widen(value) - self.delta().reshape(value.shape)).to(value.dtype)
