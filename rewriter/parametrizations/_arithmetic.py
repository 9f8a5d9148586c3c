"""Scaling, shifting, and sums with another tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import register


@register("scale")
class Scale(nn.Module):
    """Multiply by a number; two scales in a row are one.

    >>> import torch
    >>> Scale(0.5)(torch.tensor([1.0, 2.0]))
    tensor([0.5000, 1.0000])

    Arguments:
        factor: the number.
    """

    guarantee = "the value is factor * X"
    cost = "one multiplication per entry"
    reference = ""
    batched = True

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = float(factor)

    def forward(self, X: Tensor) -> Tensor:
        return X * self.factor

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return value / factor.

        Raises:
            RewriterError: the factor is zero.
        """
        return value / _not_zero("scale's factor", self.factor)

    def fuse(self, next: nn.Module) -> nn.Module | None:
        """Return the product of both scales where `next` is a scale too."""
        return Scale(self.factor * next.factor) if isinstance(next, Scale) else None

    def cancels(self, next: nn.Module) -> bool:
        """Say whether `next` divides by what this step multiplies with."""
        return isinstance(next, Scale) and self.factor * next.factor == 1.0

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


@register("shift")
class Shift(nn.Module):
    """Add a number to each entry; two shifts in a row are one.

    >>> import torch
    >>> Shift(1.0)(torch.tensor([1.0, 2.0]))
    tensor([2., 3.])

    Arguments:
        offset: the number.
    """

    guarantee = "the value is X + offset"
    cost = "one addition per entry"
    reference = ""
    batched = True

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = float(offset)

    def forward(self, X: Tensor) -> Tensor:
        return X + self.offset

    def right_inverse(self, value: Tensor) -> Tensor:
        return value - self.offset

    def fuse(self, next: nn.Module) -> nn.Module | None:
        """Return the sum of both shifts where `next` is a shift too."""
        return Shift(self.offset + next.offset) if isinstance(next, Shift) else None

    def cancels(self, next: nn.Module) -> bool:
        """Say whether `next` subtracts what this step adds."""
        return isinstance(next, Shift) and self.offset + next.offset == 0.0

    def extra_repr(self) -> str:
        return f"offset={self.offset}"


@register("affine")
class Affine(nn.Module):
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
    reference = ""
    batched = True

    def __init__(self, a: float = 1.0, b: float = 1.0, c: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.c = float(a), float(b), float(c)

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

    def extra_repr(self) -> str:
        return f"a={self.a}, b={self.b}, c={self.c}"


def _not_zero(name: str, number: float) -> float:
    if number == 0.0:
        raise RewriterError(f"{name} is zero, so a value cannot be assigned; use `init: raw`, or another number")
    return number
