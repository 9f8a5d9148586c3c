"""Entries within bounds: positive ones, and intervals."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Space
from rewriter.parametrizations.maths._cholesky import inverse_softplus
from rewriter.parametrizations.maths._precision import widen


class Positive(Space, name="positive"):
    """Make all entries positive, by the softplus or the exponential function.

    >>> import torch
    >>> Positive(map="exp")(torch.tensor([0.0, 0.0]))
    tensor([1., 1.])

    Arguments:
        map: ``softplus``, which is linear for large entries, or ``exp``.
        eps: a least value, added to all entries.
    """

    guarantee = "entries are at least eps, and greater if floating point can represent it"
    cost = "one pass over the tensor"
    takes = ("real",)
    batched = True

    map: Literal["softplus", "exp"] = "softplus"
    eps: float = 0.0

    def build(self, weight: Tensor | None) -> None:
        if self.eps < 0:
            raise RewriterError(f"positive: eps must not be negative, it is {self.eps}")

    def value(self, X: Tensor) -> Tensor:
        return (X.exp() if self.map == "exp" else functional.softplus(X)) + self.eps

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor for `value`; entries that are not above eps move just above it."""
        wide = widen(value)
        above = (wide - self.eps).clamp_min(torch.finfo(wide.dtype).eps)
        return (above.log() if self.map == "exp" else inverse_softplus(above)).to(value.dtype)


class Interval(Space, name="interval"):
    """Keep all entries between two bounds, or on one side of one bound.

    >>> import torch
    >>> Interval(low=-1.0, high=3.0)(torch.zeros(2))
    tensor([1., 1.])

    Two bounds use the logistic function, one bound the softplus.

    Arguments:
        low: the lower bound, or none.
        high: the upper bound, or none.
    """

    guarantee = "low <= entry <= high"
    cost = "one pass over the tensor"
    takes = ("real",)
    batched = True

    low: float | None = None
    high: float | None = None

    def build(self, weight: Tensor | None) -> None:
        if self.low is None and self.high is None:
            raise RewriterError("interval: give `low`, `high` or both")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise RewriterError(f"interval: low = {self.low} is not below high = {self.high}")

    def value(self, X: Tensor) -> Tensor:
        low, high = self.low, self.high
        if low is not None and high is not None:
            # Two terms reach both bounds exactly, and rounding passes neither.
            share = X.sigmoid()
            return torch.clamp(low * (1 - share) + high * share, low, high)
        if low is not None:
            return low + functional.softplus(X)
        assert high is not None
        return high - functional.softplus(X)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor for `value`; entries on a bound or beyond move just inside."""
        wide = widen(value)
        eps = torch.finfo(wide.dtype).eps
        if self.low is not None and self.high is not None:
            share = ((wide - self.low) / (self.high - self.low)).clamp(eps, 1 - eps)
            return share.logit().to(value.dtype)
        inside = wide - self.low if self.low is not None else (self.high or 0.0) - wide
        return inverse_softplus(inside.clamp_min(eps)).to(value.dtype)
