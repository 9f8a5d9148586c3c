"""Linear spaces of matrices: symmetric, skew, triangular, (block) diagonal, centred."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Space


class Symmetric(Space, name="symmetric"):
    """Mirror the upper triangle into the lower one, so that the matrix is symmetric.

    >>> import torch
    >>> Symmetric()(torch.tensor([[1.0, 2.0], [7.0, 3.0]]))
    tensor([[1., 2.],
            [2., 3.]])

    Complex matrices become Hermitian: the imaginary part of the diagonal is dropped.

    Arguments:
        lower: read the lower triangle instead of the upper one.
    """

    guarantee = "W equals its transpose, exactly"
    cost = "three passes over the tensor"
    takes = ("square",)
    batched = True

    lower: bool = False

    def forward(self, X: Tensor) -> Tensor:
        half = X.tril(-1) if self.lower else X.triu(1)
        diagonal = X.diagonal(dim1=-2, dim2=-1)
        if diagonal.is_complex():
            diagonal = diagonal.real.to(X.dtype)
        return half + half.mH + diagonal.diag_embed()

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the symmetric part of `value`."""
        return (value + value.mH) / 2


class Skew(Space, name="skew"):
    """Mirror the upper triangle into the lower one with the opposite sign, so that the matrix is skew.

    >>> import torch
    >>> Skew()(torch.tensor([[1.0, 2.0], [7.0, 3.0]]))
    tensor([[ 0.,  2.],
            [-2.,  0.]])

    Complex matrices become skew-Hermitian: the diagonal keeps its imaginary part.

    Arguments:
        lower: read the lower triangle instead of the upper one.
    """

    guarantee = "W equals minus its transpose, exactly"
    cost = "two passes over the tensor"
    takes = ("square",)
    batched = True

    lower: bool = False

    def forward(self, X: Tensor) -> Tensor:
        half = X.tril(-1) if self.lower else X.triu(1)
        skew = half - half.mH
        if X.is_complex():
            diagonal = X.diagonal(dim1=-2, dim2=-1)
            skew = skew + ((diagonal - diagonal.conj()) / 2).diag_embed()
        return skew

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the skew part of `value`."""
        return (value - value.mH) / 2


class Triangular(Space, name="triangular"):
    """Keep one triangle of a matrix and make the other one zero.

    >>> import torch
    >>> Triangular(unitriangular=True)(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[1., 0.],
            [5., 1.]])

    Arguments:
        upper: keep the upper triangle instead of the lower one.
        strict: make the diagonal zero as well.
        unitriangular: make the diagonal one.
    """

    guarantee = "the other triangle is exactly zero"
    cost = "one pass over the tensor"
    takes = ("matrix",)
    batched = True

    upper: bool = False
    strict: bool = False
    unitriangular: bool = False

    def build(self, weight: Tensor | None) -> None:
        if self.strict and self.unitriangular:
            raise RewriterError("triangular: strict makes the diagonal zero, unitriangular one; give one of them")

    def forward(self, X: Tensor) -> Tensor:
        outside = 1 if self.strict or self.unitriangular else 0
        W = X.triu(outside) if self.upper else X.tril(-outside)
        if self.unitriangular:
            W = W + torch.eye(X.size(-2), X.size(-1), dtype=X.dtype, device=X.device)
        return W


class Diagonal(Space, name="diagonal"):
    """Keep the diagonal of a matrix and make all other entries zero.

    >>> import torch
    >>> Diagonal()(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[3., 0.],
            [0., 6.]])
    """

    guarantee = "entries off the diagonal are exactly zero"
    cost = "one pass over the tensor"
    takes = ("matrix",)
    batched = True

    def forward(self, X: Tensor) -> Tensor:
        return X.tril().triu()


class BlockDiagonal(Space, name="block_diagonal"):
    """Keep equal blocks along the diagonal of a matrix and make all other entries zero.

    >>> import torch
    >>> BlockDiagonal(blocks=2, weight=torch.ones(4, 2))(torch.ones(4, 2))
    tensor([[1., 0.],
            [1., 0.],
            [0., 1.],
            [0., 1.]])

    Arguments:
        blocks: how many; divides both sides of the matrix.
    """

    guarantee = "entries outside of the blocks are exactly zero"
    cost = "one pass over the tensor"
    takes = ("matrix",)
    batched = True

    blocks: int

    def build(self, weight: Tensor) -> None:
        m, n = weight.shape[-2:]
        if self.blocks < 1 or m % self.blocks or n % self.blocks:
            raise RewriterError(f"block_diagonal: {m} x {n} cannot be divided into {self.blocks} blocks")

    def forward(self, X: Tensor) -> Tensor:
        m, n = X.size(-2), X.size(-1)
        eye = torch.eye(self.blocks, dtype=torch.bool, device=X.device)
        inside = eye.repeat_interleave(m // self.blocks, 0).repeat_interleave(n // self.blocks, 1)
        return X.masked_fill(~inside, 0.0)


class Centred(Space, name="centred"):
    """Subtract the mean along one dimension.

    >>> import torch
    >>> Centred()(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    tensor([[-1.,  1.],
            [ 0.,  0.]])

    Arguments:
        dim: the dimension along which the mean becomes zero.
    """

    guarantee = "the mean along `dim` is zero up to rounding"
    cost = "two passes over the tensor"
    reference = "Qiao et al., Weight standardization, https://arxiv.org/abs/1903.10520"

    dim: int = -1

    def value(self, X: Tensor) -> Tensor:
        return X - X.mean(dim=self.dim, keepdim=True)
