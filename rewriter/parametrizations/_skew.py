"""Skew-symmetric (skew-Hermitian, where complex) matrices."""

from __future__ import annotations

from torch import Tensor, nn

from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_square


@register("skew")
class Skew(nn.Module):
    """Mirror the upper triangle into the lower one with the opposite sign, so that the matrix is skew.

    >>> import torch
    >>> Skew()(torch.tensor([[1.0, 2.0], [7.0, 3.0]]))
    tensor([[ 0.,  2.],
            [-2.,  0.]])

    Complex matrices become skew-Hermitian: the diagonal keeps its imaginary part.

    Arguments:
        lower: read the lower triangle instead of the upper one.
        weight: of shape ``(..., n, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is not square.
    """

    guarantee = "W equals minus its transpose, exactly"
    cost = "two passes over the tensor"
    reference = ""
    batched = True

    def __init__(self, lower: bool = False, *, weight: Tensor | None = None) -> None:
        super().__init__()
        if weight is not None:
            require_square("skew", weight)
        self.lower = lower

    def forward(self, X: Tensor) -> Tensor:
        half = X.tril(-1) if self.lower else X.triu(1)
        skew = half - half.mH
        if X.is_complex():
            diagonal = X.diagonal(dim1=-2, dim2=-1)
            skew = skew + ((diagonal - diagonal.conj()) / 2).diag_embed()
        return skew

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the skew part of `value`: `value` itself where it is skew."""
        return (value - value.mH) / 2

    def extra_repr(self) -> str:
        return f"lower={self.lower}"
