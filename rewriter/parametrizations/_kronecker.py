"""Kronecker products, stored as their factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_matrix, require_real, require_shape
from rewriter.parametrizations.maths._precision import wide_dtype, widen


@register("kronecker")
class Kronecker(nn.Module):
    """Compute a matrix as a Kronecker product, or a sum of several: Σ Aₖ ⊗ Bₖ.

    >>> import torch
    >>> step = Kronecker(factor_shape=[2, 1], weight=torch.zeros(4, 3))
    >>> [factor.shape for factor in step.right_inverse(torch.ones(4, 3))]
    [torch.Size([1, 2, 1]), torch.Size([1, 2, 3])]

    The factors are what is stored. The right inverse finds the nearest sum of products: a truncated SVD of
    the matrix whose rows are the blocks of the value.

    Arguments:
        factor_shape: shape of the first factor; it divides that of the matrix.
        rank: number of products that are added.
        weight: of shape ``(..., m, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is no real matrix, or the factors do not fit it.
    """

    guarantee = "the value is a sum of `rank` Kronecker products"
    cost = "O(rank · m · n); the right inverse one SVD"
    reference = "Van Loan and Pitsianis 1993, Approximation with Kronecker Products"
    batched = True

    def __init__(self, factor_shape: Sequence[int], rank: int = 1, *, weight: Tensor) -> None:
        super().__init__()
        require_matrix("kronecker", weight)
        require_real("kronecker", weight)
        m, n = weight.shape[-2:]
        if len(factor_shape) != 2 or min(factor_shape) < 1 or m % factor_shape[0] or n % factor_shape[1]:
            raise RewriterError(f"factor_shape {list(factor_shape)} is no [rows, columns] that divides {m} x {n}")
        self.rows, self.columns = int(factor_shape[0]), int(factor_shape[1])
        largest = min(self.rows * self.columns, m * n // (self.rows * self.columns))
        if not 1 <= rank <= largest:
            raise RewriterError(
                f"kronecker with factors of {self.rows} x {self.columns}: rank in 1..{largest}, not {rank}"
            )
        self.rank, self.size = rank, list(weight.shape)
        self.dtype, self.device = weight.dtype, weight.device

    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        left = widen(A).unsqueeze(-2).unsqueeze(-1)
        right = widen(B).unsqueeze(-2).unsqueeze(-4)
        blocks = (left * right).sum(-5)
        return blocks.flatten(-2).flatten(-3, -2).to(A.dtype)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the nearest sum of products, either with the root of the singular values."""
        require_shape("kronecker", value, tuple(self.size))
        inner = (self.size[-2] // self.rows, self.size[-1] // self.columns)
        blocks = torch.unflatten(widen(value), -1, (self.columns, inner[1]))
        blocks = torch.unflatten(blocks, -3, (self.rows, inner[0])).transpose(-3, -2)
        U, S, Vh = torch.linalg.svd(blocks.flatten(-2).flatten(-3, -2), full_matrices=False)
        root = S[..., : self.rank, None].sqrt()
        A = torch.unflatten(U[..., : self.rank].mT * root, -1, (self.rows, self.columns))
        B = torch.unflatten(Vh[..., : self.rank, :] * root, -1, inner)
        return A.to(value.dtype), B.to(value.dtype)

    def sample(self) -> Tensor:
        """Return a sum of products of Gaussian factors whose entries have variance 1 / n."""
        dtype = wide_dtype(self.dtype)
        *lead, m, n = self.size
        inner = (m // self.rows, n // self.columns)
        A = torch.randn(*lead, self.rank, self.rows, self.columns, dtype=dtype, device=self.device)
        B = torch.randn(*lead, self.rank, *inner, dtype=dtype, device=self.device)
        value: Tensor = self.forward(A, B) / (self.rank * n) ** 0.5
        return value.to(self.dtype)

    def extra_repr(self) -> str:
        return f"factor_shape=[{self.rows}, {self.columns}], rank={self.rank}"
