"""Vectors of a given norm, and probability vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_real
from rewriter.parametrizations.maths._precision import Precise, wide_dtype, widen


@register("sphere")
class Sphere(Precise):
    """Scale the vectors along one dimension to the same norm.

    >>> import torch
    >>> Sphere(radius=10.0)(torch.tensor([3.0, 4.0]))
    tensor([6., 8.])

    A zero vector becomes the one with equal entries.

    Arguments:
        radius: the norm.
        dim: the dimension along which the vectors lie.
        weight: filled in by the site.

    Raises:
        RewriterError: `radius` is not positive.
    """

    guarantee = "|w| = radius along `dim`, up to 4 eps"
    cost = "two passes over the tensor"
    reference = ""

    def __init__(self, radius: float = 1.0, dim: int = -1, *, weight: Tensor | None = None) -> None:
        super().__init__()
        if radius <= 0:
            raise RewriterError(f"sphere: radius must be positive, not {radius}")
        self.radius, self.dim = float(radius), dim
        self.like = None if weight is None else (tuple(weight.shape), weight.dtype, weight.device)

    def value(self, X: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(X, dim=self.dim, keepdim=True)
        zero = norm == 0
        direction = X / torch.where(zero, torch.ones_like(norm), norm)
        return self.radius * torch.where(zero, torch.full_like(X, X.size(self.dim) ** -0.5), direction)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the nearest tensor with the given norm."""
        return self.forward(value)

    def sample(self) -> Tensor:
        """Return vectors drawn uniformly from the sphere."""
        if self.like is None:
            raise RewriterError("sphere: a sample needs the weight that the site fills in")
        shape, dtype, device = self.like
        return self.value(torch.randn(shape, dtype=wide_dtype(dtype), device=device)).to(dtype)

    def extra_repr(self) -> str:
        return f"radius={self.radius}, dim={self.dim}"


@register("simplex")
class Simplex(Precise):
    """Turn the vectors along one dimension into probabilities, by the softmax.

    >>> import torch
    >>> Simplex()(torch.zeros(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])

    Arguments:
        dim: the dimension along which the entries sum to one.
        weight: real, filled in by the site.

    Raises:
        RewriterError: the weight is complex.
    """

    guarantee = "entries are at least zero and sum to one along `dim`, up to n eps"
    cost = "three passes over the tensor"
    reference = ""

    def __init__(self, dim: int = -1, *, weight: Tensor | None = None) -> None:
        super().__init__()
        if weight is not None:
            require_real("simplex", weight)
        self.dim = dim
        self.like = None if weight is None else (tuple(weight.shape), weight.dtype, weight.device)

    def value(self, X: Tensor) -> Tensor:
        return X.softmax(dim=self.dim)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the logarithms of the entries; entries that are not positive become tiny."""
        wide = widen(value)
        return wide.clamp_min(torch.finfo(wide.dtype).tiny).log().to(value.dtype)

    def sample(self) -> Tensor:
        """Return probabilities drawn uniformly from the simplex."""
        if self.like is None:
            raise RewriterError("simplex: a sample needs the weight that the site fills in")
        shape, dtype, device = self.like
        weights = torch.empty(shape, dtype=wide_dtype(dtype), device=device).exponential_()
        return (weights / weights.sum(dim=self.dim, keepdim=True)).to(dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
