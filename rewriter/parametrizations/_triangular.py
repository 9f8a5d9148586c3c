"""Triangular matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_matrix


@register("triangular")
class Triangular(nn.Module):
    """Keep one triangle of a matrix and make the other one zero.

    >>> import torch
    >>> Triangular(unitriangular=True)(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[1., 0.],
            [5., 1.]])

    Arguments:
        upper: keep the upper triangle instead of the lower one.
        strict: make the diagonal zero as well.
        unitriangular: make the diagonal one.
        weight: of shape ``(..., m, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is no matrix, or both `strict` and `unitriangular` are given.
    """

    guarantee = "the other triangle is exactly zero"
    cost = "one pass over the tensor"
    reference = ""
    batched = True

    def __init__(
        self,
        upper: bool = False,
        strict: bool = False,
        unitriangular: bool = False,
        *,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        if weight is not None:
            require_matrix("triangular", weight)
        if strict and unitriangular:
            raise RewriterError("triangular: strict makes the diagonal zero, unitriangular one; give one of them")
        self.upper, self.strict, self.unitriangular = upper, strict, unitriangular

    def forward(self, X: Tensor) -> Tensor:
        outside = 1 if self.strict or self.unitriangular else 0
        W = X.triu(outside) if self.upper else X.tril(-outside)
        if self.unitriangular:
            W = W + torch.eye(X.size(-2), X.size(-1), dtype=X.dtype, device=X.device)
        return W

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value` itself: what is outside of the triangle is not read."""
        return value

    def extra_repr(self) -> str:
        return f"upper={self.upper}, strict={self.strict}, unitriangular={self.unitriangular}"
