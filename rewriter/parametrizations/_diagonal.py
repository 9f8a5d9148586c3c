"""Diagonal and block diagonal matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_matrix


@register("diagonal")
class Diagonal(nn.Module):
    """Keep the diagonal of a matrix and make all other entries zero.

    >>> import torch
    >>> Diagonal()(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[3., 0.],
            [0., 6.]])

    Arguments:
        weight: of shape ``(..., m, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is no matrix.
    """

    guarantee = "entries off the diagonal are exactly zero"
    cost = "one pass over the tensor"
    reference = ""
    batched = True

    def __init__(self, *, weight: Tensor | None = None) -> None:
        super().__init__()
        if weight is not None:
            require_matrix("diagonal", weight)

    def forward(self, X: Tensor) -> Tensor:
        return X.tril().triu()

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value` itself: what is off the diagonal is not read."""
        return value


@register("block_diagonal")
class BlockDiagonal(nn.Module):
    """Keep equal blocks along the diagonal of a matrix and make all other entries zero.

    >>> import torch
    >>> BlockDiagonal(blocks=2, weight=torch.ones(4, 2))(torch.ones(4, 2))
    tensor([[1., 0.],
            [1., 0.],
            [0., 1.],
            [0., 1.]])

    Arguments:
        blocks: how many; divides both sides of the matrix.
        weight: of shape ``(..., m, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is no matrix or cannot be divided into that many blocks.
    """

    guarantee = "entries outside of the blocks are exactly zero"
    cost = "one pass over the tensor"
    reference = ""
    batched = True

    def __init__(self, blocks: int, *, weight: Tensor) -> None:
        super().__init__()
        require_matrix("block_diagonal", weight)
        m, n = weight.shape[-2:]
        if blocks < 1 or m % blocks or n % blocks:
            raise RewriterError(f"block_diagonal: {m} x {n} cannot be divided into {blocks} blocks")
        self.blocks = blocks

    def forward(self, X: Tensor) -> Tensor:
        m, n = X.size(-2), X.size(-1)
        eye = torch.eye(self.blocks, dtype=torch.bool, device=X.device)
        inside = eye.repeat_interleave(m // self.blocks, 0).repeat_interleave(n // self.blocks, 1)
        return X.masked_fill(~inside, 0.0)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value` itself: what is outside of the blocks is not read."""
        return value

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}"
