"""Vectors along one dimension: of a given norm, probabilities, and points of hyperbolic space."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Space
from rewriter.parametrizations.maths._precision import widen


class Sphere(Space, name="sphere"):
    """Scale the vectors along one dimension to the same norm.

    >>> import torch
    >>> Sphere(radius=10.0)(torch.tensor([3.0, 4.0]))
    tensor([6., 8.])

    A zero vector becomes the one with equal entries.

    Arguments:
        radius: the norm.
        dim: the dimension along which the vectors lie.
    """

    guarantee = "|w| = radius along `dim`, up to 4 eps"
    cost = "two passes over the tensor"

    radius: float = 1.0
    dim: int = -1

    def build(self, weight: Tensor | None) -> None:
        if self.radius <= 0:
            raise RewriterError(f"sphere: radius must be positive, not {self.radius}")

    def value(self, X: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(X, dim=self.dim, keepdim=True)
        zero = norm == 0
        direction = X / torch.where(zero, torch.ones_like(norm), norm)
        return self.radius * torch.where(zero, torch.full_like(X, X.size(self.dim) ** -0.5), direction)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the nearest tensor with the given norm."""
        return self.forward(value)


class Simplex(Space, name="simplex"):
    """Turn the vectors along one dimension into probabilities, by the softmax.

    >>> import torch
    >>> Simplex()(torch.zeros(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])

    Arguments:
        dim: the dimension along which the entries sum to one.
    """

    guarantee = "entries are at least zero and sum to one along `dim`, up to n eps"
    cost = "three passes over the tensor"
    takes = ("real",)

    dim: int = -1

    def value(self, X: Tensor) -> Tensor:
        return X.softmax(dim=self.dim)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the logarithms of the entries; entries that are not positive become tiny."""
        wide = widen(value)
        return wide.clamp_min(torch.finfo(wide.dtype).tiny).log().to(value.dtype)

    def sample(self) -> Tensor:
        """Return probabilities drawn uniformly from the simplex."""
        weights = torch.empty_like(self.noise()).exponential_()
        return (weights / weights.sum(dim=self.dim, keepdim=True)).to(self.dtype)


class PoincareBall(Space, name="poincare_ball"):
    """Vectors inside of a ball, by the exponential map of hyperbolic space at its centre.

    >>> import torch
    >>> PoincareBall()(torch.tensor([100.0, 0.0]))
    tensor([1.0000, 0.0000])

    Arguments:
        curvature: minus the curvature of the space, c; the ball has radius 1 / sqrt(c).
        dim: the dimension along which the vectors lie.
    """

    guarantee = "sqrt(c) |w| <= 1 - 4 eps along `dim`, in float32 and float64"
    cost = "two passes over the tensor"
    reference = "Ganea, Becigneul and Hofmann, https://arxiv.org/abs/1805.09112"
    takes = ("real",)

    curvature: float = 1.0
    dim: int = -1

    def build(self, weight: Tensor | None) -> None:
        if self.curvature <= 0:
            raise RewriterError(f"poincare_ball: curvature must be positive, not {self.curvature}")

    def value(self, X: Tensor) -> Tensor:
        root = self.curvature**0.5
        z = root * torch.linalg.vector_norm(X, dim=self.dim, keepdim=True)
        zero = z == 0
        safe = torch.where(zero, torch.ones_like(z), z)
        # tanh rounds to one for large z, and one is the boundary.
        shrunk = safe.tanh().clamp_max(1 - _margin(X)) / safe
        return X * torch.where(zero, torch.ones_like(z), shrunk)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor for `value`; vectors on the boundary or beyond move just inside."""
        wide, root = widen(value), self.curvature**0.5
        z = root * torch.linalg.vector_norm(wide, dim=self.dim, keepdim=True)
        safe = torch.where(z == 0, torch.ones_like(z), z)
        inside = safe.clamp_max(1 - _margin(wide))
        return torch.where(z == 0, wide, wide * (inside.atanh() / safe)).to(value.dtype)


def _margin(X: Tensor) -> float:
    """Return six roundings; TorchScript has no ``torch.finfo``."""
    return 1.4e-15 if X.dtype == torch.float64 else 7.2e-7


class Lorentz(Space, name="lorentz"):
    """Points of the hyperboloid: the first entry of a vector is computed from the others.

    >>> import torch
    >>> Lorentz()(torch.tensor([0.0, 3.0, 4.0])).square()
    tensor([26.,  9., 16.])

    Arguments:
        curvature: minus the curvature of the space, c: ``w_0^2 = 1/c + w_1^2 + ... + w_n^2`` along the last
            dimension.
    """

    guarantee = "|w_0^2 - w_1^2 - ... - w_n^2 - 1/c| <= 4 eps w_0^2, and w_0 > 0"
    cost = "two passes over the tensor"
    reference = "Nickel and Kiela, https://arxiv.org/abs/1806.03417"
    takes = ("real",)

    curvature: float = 1.0

    def build(self, weight: Tensor | None) -> None:
        if self.curvature <= 0:
            raise RewriterError(f"lorentz: curvature must be positive, not {self.curvature}")

    def value(self, X: Tensor) -> Tensor:
        space = X[..., 1:]
        time = torch.sqrt(space.square().sum(dim=-1, keepdim=True) + 1 / self.curvature)
        return torch.cat([time, space], dim=-1)
