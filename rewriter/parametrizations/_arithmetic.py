"""Scaling, shifting, and sums with another tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Parametrization


class Scale(Parametrization, name="scale"):
    """Multiply by a number; two scales in a row are one.

    >>> import torch
    >>> Scale(0.5)(torch.tensor([1.0, 2.0]))
    tensor([0.5000, 1.0000])

    Arguments:
        factor: the number.
    """

    guarantee = "the value is factor * X"
    cost = "one multiplication per entry"
    batched = True

    factor: float

    def forward(self, X: Tensor) -> Tensor:
        return X * self.factor

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return value / factor.

        Raises:
            RewriterError: the factor is zero.
        """
        return value / _not_zero("scale's factor", self.factor)

    def fuse(self, next: nn.Module) -> nn.Module | None:
        """Return the product of both scales if `next` is a scale."""
        return Scale(self.factor * next.factor) if isinstance(next, Scale) else None

    def cancels(self, next: nn.Module) -> bool:
        """Return whether `next` divides by the factor of this step."""
        return isinstance(next, Scale) and self.factor * next.factor == 1.0


class Shift(Parametrization, name="shift"):
    """Add a number to each entry; two shifts in a row are one.

    >>> import torch
    >>> Shift(1.0)(torch.tensor([1.0, 2.0]))
    tensor([2., 3.])

    Arguments:
        offset: the number.
    """

    guarantee = "the value is X + offset"
    cost = "one addition per entry"
    batched = True

    offset: float

    def forward(self, X: Tensor) -> Tensor:
        return X + self.offset

    def right_inverse(self, value: Tensor) -> Tensor:
        return value - self.offset

    def fuse(self, next: nn.Module) -> nn.Module | None:
        """Return the sum of both shifts if `next` is a shift."""
        return Shift(self.offset + next.offset) if isinstance(next, Shift) else None

    def cancels(self, next: nn.Module) -> bool:
        """Return whether `next` subtracts the offset of this step."""
        return isinstance(next, Shift) and self.offset + next.offset == 0.0


class Affine(Parametrization, name="affine"):
    """Combine the tensor with another one: a·X + b·other + c.

    >>> import torch
    >>> Affine(a=2.0, b=-1.0)(torch.tensor([1.0]), torch.tensor([3.0]))
    tensor([-1.])

    In a spec ``affine: {inputs: ["encoder.weight"]}`` names the other tensor of the model. Without ``inputs``
    the other tensor is stored beside the first one, as a further original.

    Arguments:
        a: factor of the tensor itself.
        b: factor of the other one.
        c: added to each entry.
    """

    guarantee = "the value is a*X + b*other + c"
    cost = "two multiplications and two additions per entry"
    batched = True

    a: float = 1.0
    b: float = 1.0
    c: float = 0.0

    def forward(self, X: Tensor, other: Tensor) -> Tensor:
        return self.a * X + (self.b * other + self.c)

    def right_inverse(self, value: Tensor, other: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the X that gives `value` with this `other`; without one, X and zeros.

        Raises:
            RewriterError: `a` is zero.
        """
        a = _not_zero("affine's a", self.a)
        if other is None:
            return (value - self.c) / a, torch.zeros_like(value)
        return (value - (self.b * other + self.c)) / a


def _not_zero(name: str, number: float) -> float:
    if number == 0.0:
        raise RewriterError(f"{name} is zero, so a value cannot be assigned; use `init: raw`, or another number")
    return number
