"""Entries within bounds: positive ones, and intervals."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_real
from rewriter.parametrizations.maths._precision import Precise, widen
from rewriter.parametrizations.maths._softplus import inverse_softplus


@register("positive")
class Positive(Precise):
    """Make all entries positive, by the softplus or the exponential function.

    >>> import torch
    >>> Positive(map="exp")(torch.tensor([0.0, 0.0]))
    tensor([1., 1.])

    Arguments:
        map: ``softplus``, which is linear for large entries, or ``exp``.
        eps: a least value, added to all entries.
        weight: real, filled in by the site.

    Raises:
        RewriterError: the weight is complex or `eps` is negative.
    """

    guarantee = "entries are at least eps, and greater where floating point can tell"
    cost = "one pass over the tensor"
    reference = ""
    batched = True

    def __init__(
        self, map: Literal["softplus", "exp"] = "softplus", eps: float = 0.0, *, weight: Tensor | None = None
    ) -> None:
        super().__init__()
        if weight is not None:
            require_real("positive", weight)
        if map not in ("softplus", "exp"):
            raise RewriterError(f"positive: map must be softplus or exp, not {map!r}")
        if eps < 0:
            raise RewriterError(f"positive: eps must not be negative, it is {eps}")
        self.map: str = map
        self.eps = float(eps)

    def value(self, X: Tensor) -> Tensor:
        return (X.exp() if self.map == "exp" else functional.softplus(X)) + self.eps

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor that stands for `value`; entries that are not above eps move just above it."""
        wide = widen(value)
        above = (wide - self.eps).clamp_min(torch.finfo(wide.dtype).eps)
        return (above.log() if self.map == "exp" else inverse_softplus(above)).to(value.dtype)

    def extra_repr(self) -> str:
        return f"map={self.map}, eps={self.eps}"


@register("interval")
class Interval(Precise):
    """Keep all entries between two bounds, or on one side of one bound.

    >>> import torch
    >>> Interval(low=-1.0, high=3.0)(torch.zeros(2))
    tensor([1., 1.])

    Two bounds use the logistic function, one bound the softplus.

    Arguments:
        low: the lower bound, or none.
        high: the upper bound, or none.
        weight: real, filled in by the site.

    Raises:
        RewriterError: the weight is complex, there is no bound, or `low` is not below `high`.
    """

    guarantee = "low <= entry <= high"
    cost = "one pass over the tensor"
    reference = ""
    batched = True

    def __init__(self, low: float | None = None, high: float | None = None, *, weight: Tensor | None = None) -> None:
        super().__init__()
        if weight is not None:
            require_real("interval", weight)
        if low is None and high is None:
            raise RewriterError("interval: give `low`, `high` or both")
        if low is not None and high is not None and not low < high:
            raise RewriterError(f"interval: low = {low} is not below high = {high}")
        self.low = None if low is None else float(low)
        self.high = None if high is None else float(high)

    def value(self, X: Tensor) -> Tensor:
        low, high = self.low, self.high
        if low is not None and high is not None:
            # Two terms, so that both bounds are met exactly and neither is passed by rounding.
            share = X.sigmoid()
            return torch.clamp(low * (1 - share) + high * share, low, high)
        if low is not None:
            return low + functional.softplus(X)
        assert high is not None
        return high - functional.softplus(X)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor that stands for `value`; entries on a bound or beyond move just inside."""
        wide = widen(value)
        eps = torch.finfo(wide.dtype).eps
        if self.low is not None and self.high is not None:
            share = ((wide - self.low) / (self.high - self.low)).clamp(eps, 1 - eps)
            return share.logit().to(value.dtype)
        inside = wide - self.low if self.low is not None else (self.high or 0.0) - wide
        return inverse_softplus(inside.clamp_min(eps)).to(value.dtype)

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}"
