"""Points of hyperbolic space, in two models."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_real
from rewriter.parametrizations.maths._precision import Precise, widen


@register("poincare_ball")
class PoincareBall(Precise):
    """Vectors inside of a ball, by the exponential map of hyperbolic space at its centre.

    >>> import torch
    >>> PoincareBall()(torch.tensor([100.0, 0.0]))
    tensor([1.0000, 0.0000])

    Arguments:
        curvature: minus the curvature of the space, c; the ball has radius 1 / sqrt(c).
        dim: the dimension along which the vectors lie.
        weight: real, filled in by the site.

    Raises:
        RewriterError: the weight is complex or `curvature` is not positive.
    """

    guarantee = "sqrt(c) |w| <= 1 - 4 eps along `dim`, in float32 and float64"
    cost = "two passes over the tensor"
    reference = "Ganea, Becigneul and Hofmann, https://arxiv.org/abs/1805.09112"

    def __init__(self, curvature: float = 1.0, dim: int = -1, *, weight: Tensor | None = None) -> None:
        super().__init__()
        if weight is not None:
            require_real("poincare_ball", weight)
        if curvature <= 0:
            raise RewriterError(f"poincare_ball: curvature must be positive, not {curvature}")
        self.curvature, self.dim = float(curvature), dim

    def value(self, X: Tensor) -> Tensor:
        root = self.curvature**0.5
        z = root * torch.linalg.vector_norm(X, dim=self.dim, keepdim=True)
        zero = z == 0
        safe = torch.where(zero, torch.ones_like(z), z)
        # Far out tanh rounds to one, which would be on the boundary: infinitely far.
        shrunk = safe.tanh().clamp_max(1 - _margin(X)) / safe
        return X * torch.where(zero, torch.ones_like(z), shrunk)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor that stands for `value`; vectors on the boundary or beyond move just inside."""
        wide, root = widen(value), self.curvature**0.5
        z = root * torch.linalg.vector_norm(wide, dim=self.dim, keepdim=True)
        safe = torch.where(z == 0, torch.ones_like(z), z)
        inside = safe.clamp_max(1 - _margin(wide))
        return torch.where(z == 0, wide, wide * (inside.atanh() / safe)).to(value.dtype)

    def extra_repr(self) -> str:
        return f"curvature={self.curvature}, dim={self.dim}"


def _margin(X: Tensor) -> float:
    """Return six roundings; TorchScript has no ``torch.finfo``."""
    return 1.4e-15 if X.dtype == torch.float64 else 7.2e-7


@register("lorentz")
class Lorentz(Precise):
    """Points of the hyperboloid: the first entry of a vector is computed from the others.

    >>> import torch
    >>> Lorentz()(torch.tensor([0.0, 3.0, 4.0])).square()
    tensor([26.,  9., 16.])

    Arguments:
        curvature: minus the curvature of the space, c: ``w_0^2 = 1/c + w_1^2 + ... + w_n^2`` along the last
            dimension.
        weight: real, filled in by the site.

    Raises:
        RewriterError: the weight is complex or `curvature` is not positive.
    """

    guarantee = "|w_0^2 - w_1^2 - ... - w_n^2 - 1/c| <= 4 eps w_0^2, and w_0 > 0"
    cost = "two passes over the tensor"
    reference = "Nickel and Kiela, https://arxiv.org/abs/1806.03417"

    def __init__(self, curvature: float = 1.0, *, weight: Tensor | None = None) -> None:
        super().__init__()
        if weight is not None:
            require_real("lorentz", weight)
        if curvature <= 0:
            raise RewriterError(f"lorentz: curvature must be positive, not {curvature}")
        self.curvature = float(curvature)

    def value(self, X: Tensor) -> Tensor:
        space = X[..., 1:]
        time = torch.sqrt(space.square().sum(dim=-1, keepdim=True) + 1 / self.curvature)
        return torch.cat([time, space], dim=-1)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value` itself: its first entry is not read."""
        return value

    def extra_repr(self) -> str:
        return f"curvature={self.curvature}"
