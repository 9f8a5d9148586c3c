"""One parametrization with a weight and originals, on which laws are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter._given import kind_of
from rewriter.errors import RewriterError
from rewriter.parametrizations import _registry

Subject = nn.Module | Callable[..., nn.Module] | str
"""A parametrization, a class or factory of one, or a name that a spec could use."""


class NotApplicable(Exception):
    """A law says nothing about this parametrization; the message is the reason."""


class Violated(Exception):
    """A law does not hold; the message is what was found."""


@dataclass(frozen=True)
class Case:
    """A parametrization in eval mode, and tensors to evaluate it on.

    Arguments:
        module: the parametrization.
        build: builds another instance for another weight; ``None`` where an instance was given.
        weight: a random tensor of the shape and dtype to check.
        originals: tensors that `module` takes.
        tolerance: for two values that should be equal, relative to their size.
    """

    module: nn.Module
    build: Callable[[Tensor], nn.Module] | None
    weight: Tensor
    originals: tuple[Tensor, ...]
    tolerance: float

    @classmethod
    def of(
        cls,
        subject: Subject,
        weight: Tensor,
        arguments: Mapping[str, Any],
        originals: Sequence[Tensor] | None,
        tolerance: float | None,
    ) -> Case:
        """Return the case of `check_parametrization`'s arguments."""
        module, build = instance(subject, weight, arguments)
        if originals is None:
            originals = [
                X + 0.1 * torch.randn_like(X) if X.is_floating_point() or X.is_complex() else X
                for X in start(module, weight)
            ]
        if tolerance is None:
            tolerance = default_tolerance(weight)
        return cls(module.eval(), build, weight, tuple(originals), tolerance)

    def value(self) -> Tensor:
        """Evaluate the parametrization on the originals."""
        return tensor(self.module(*self.originals))

    def fresh(self, weight: Tensor) -> nn.Module:
        """Build another instance."""
        if self.build is None:
            raise NotApplicable("an instance was given, not a class that can be built for another shape")
        return self.build(weight).eval()

    def require_equal(self, found: Tensor, wanted: Tensor, sentence: str) -> None:
        """Raise `Violated` with this sentence unless two values are equal within the tolerance."""
        if found.shape != wanted.shape:
            raise Violated(f"{sentence}: shapes {list(found.shape)} and {list(wanted.shape)}")
        difference, allowed = distance(found, wanted), self.tolerance * size_of(wanted)
        if not difference <= allowed:
            raise Violated(f"{sentence}: they differ by {difference:.2g}, more than {allowed:.2g}")


def instance(
    subject: Subject, weight: Tensor, arguments: Mapping[str, Any]
) -> tuple[nn.Module, Callable[[Tensor], nn.Module] | None]:
    """Return a parametrization for `weight`, and what builds others, if it was not given as a module."""
    if isinstance(subject, nn.Module):
        return subject, None
    factory = _registry.find(subject) if isinstance(subject, str) else subject

    def build(weight: Tensor) -> nn.Module:
        return _registry.construct(factory, weight, arguments)

    return build(weight), build


def inverse(module: nn.Module, value: Tensor) -> tuple[Tensor, ...]:
    """Return the originals of a value, by the right inverse."""
    right_inverse: Any = getattr(module, "right_inverse", None)
    if right_inverse is None:
        raise NotApplicable("it has no right_inverse")
    try:
        found = right_inverse(value)
    except NotImplementedError as reason:
        raise NotApplicable(str(reason)) from None
    return (found,) if isinstance(found, Tensor) else tuple(found)


def start(module: nn.Module, weight: Tensor) -> tuple[Tensor, ...]:
    """Return originals: those of `weight`, those of a sample where it is refused, `weight` without right inverse."""
    draw: Any = getattr(module, "sample", None)
    try:
        return inverse(module, weight)
    except NotApplicable:
        return (weight,)
    except RewriterError:
        return (weight,) if draw is None else inverse(module, draw())


def tensor(value: Any) -> Tensor:
    """Return what a parametrization returned, if it is a tensor."""
    if not isinstance(value, Tensor):
        raise Violated(f"forward returned {kind_of(value)}, not a tensor")
    return value


def distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors of one shape."""
    return (one - other).abs().max().item() if one.numel() else 0.0


def size_of(value: Tensor) -> float:
    """Return the largest entry, and at least 1."""
    return max(1.0, value.abs().max().item()) if value.numel() else 1.0


def default_tolerance(weight: Tensor) -> float:
    """Return ``1e3 * n * eps`` for the longest dimension n."""
    eps = torch.finfo(weight.dtype).eps if weight.is_floating_point() or weight.is_complex() else 0.0
    return 1e3 * max(weight.shape, default=1) * eps
