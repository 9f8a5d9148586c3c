"""Symmetric (Hermitian, where complex) matrices."""

from __future__ import annotations

from torch import Tensor, nn

from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_square


@register("symmetric")
class Symmetric(nn.Module):
    """Mirror the upper triangle into the lower one, so that the matrix is symmetric.

    >>> import torch
    >>> Symmetric()(torch.tensor([[1.0, 2.0], [7.0, 3.0]]))
    tensor([[1., 2.],
            [2., 3.]])

    Complex matrices become Hermitian: the imaginary part of the diagonal is dropped.

    Arguments:
        lower: read the lower triangle instead of the upper one.
        weight: of shape ``(..., n, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is not square.
    """

    guarantee = "W equals its transpose, exactly"
    cost = "three passes over the tensor"
    reference = ""
    batched = True

    def __init__(self, lower: bool = False, *, weight: Tensor | None = None) -> None:
        super().__init__()
        if weight is not None:
            require_square("symmetric", weight)
        self.lower = lower

    def forward(self, X: Tensor) -> Tensor:
        half = X.tril(-1) if self.lower else X.triu(1)
        diagonal = X.diagonal(dim1=-2, dim2=-1)
        if diagonal.is_complex():
            diagonal = diagonal.real.to(X.dtype)
        return half + half.mH + diagonal.diag_embed()

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the symmetric part of `value`: `value` itself where it is symmetric."""
        return (value + value.mH) / 2

    def extra_repr(self) -> str:
        return f"lower={self.lower}"
