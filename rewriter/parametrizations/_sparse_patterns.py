"""Masks with a pattern that hardware can use: n of every m entries, and whole blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import prune

from rewriter.errors import RewriterError
from rewriter.parametrizations._mask import FixedMask
from rewriter.parametrizations._pruning import kept
from rewriter.parametrizations._registry import register


@register("n_m")
class NM(FixedMask):
    """Keep the `n` entries of largest magnitude in every group of `m` along a dimension (2:4 by default).

    >>> import torch
    >>> weight = torch.tensor([[1.0, -4.0, 3.0, 2.0]])
    >>> NM(weight=weight)(weight)
    tensor([[ 0., -4.,  3.,  0.]])

    Arguments:
        n: entries kept in each group.
        m: size of a group; divides the dimension.
        dim: the dimension that is cut into groups.
        weight: the tensor to prune, filled in by the site.

    Raises:
        RewriterError: `m` does not divide the dimension, or `n` is not in 0..m.
    """

    guarantee = "at most n of every m entries along dim are not zero"
    cost = "one multiplication per entry"
    reference = "Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv:2104.08378"

    def __init__(self, n: int = 2, m: int = 4, dim: int = -1, *, weight: Tensor) -> None:
        if not 0 <= n <= m or m < 1:
            raise RewriterError(f"n_m keeps n of m entries, with 0 <= n <= m: n={n}, m={m}")
        if not -weight.dim() <= dim < weight.dim() or weight.shape[dim] % m:
            raise RewriterError(f"{m} does not divide dimension {dim} of a weight of shape {list(weight.shape)}")
        groups = torch.unflatten(weight.detach().abs().movedim(dim, -1), -1, (-1, m))
        largest = groups.topk(n, dim=-1).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, largest, True)
        super().__init__(mask.flatten(-2).movedim(-1, dim))


@register("block_sparse")
class BlockSparse(FixedMask):
    """Prune the blocks of smallest Lⁿ norm of a matrix.

    >>> import torch
    >>> weight = torch.tensor([[1.0, 1.0, 0.1, 0.1], [1.0, 1.0, 0.1, 0.1]])
    >>> BlockSparse(amount=1, block_shape=[2, 2], weight=weight)(weight)
    tensor([[1., 1., 0., 0.],
            [1., 1., 0., 0.]])

    Arguments:
        amount: how many blocks (int), or which part of them, in [0, 1] (float), become zero.
        block_shape: rows and columns of a block; they divide the last two dimensions.
        n: the norm that ranks the blocks.
        weight: the tensor to prune, of two or more dimensions, filled in by the site.

    Raises:
        RewriterError: the blocks do not tile the weight.
    """

    guarantee = "pruned blocks are exactly zero"
    cost = "one multiplication per entry"
    reference = "Narang, Undersander, Diamos 2017, Block-Sparse Recurrent Neural Networks, arXiv:1711.02782"

    def __init__(self, amount: int | float, block_shape: Sequence[int], n: float = 2.0, *, weight: Tensor) -> None:
        if len(block_shape) != 2 or weight.dim() < 2 or min(block_shape) < 1:
            raise RewriterError(f"block_shape is [rows, columns] for a matrix, not {list(block_shape)}")
        rows, columns = block_shape
        if weight.shape[-2] % rows or weight.shape[-1] % columns:
            raise RewriterError(f"blocks of {rows}x{columns} do not tile a weight of shape {list(weight.shape)}")
        blocks = torch.unflatten(torch.unflatten(weight.detach(), -2, (-1, rows)), -1, (-1, columns))
        norms = torch.linalg.vector_norm(blocks, n, dim=(-3, -1))
        mask = kept(prune.L1Unstructured, norms, amount)
        super().__init__(mask.repeat_interleave(rows, -2).repeat_interleave(columns, -1))
