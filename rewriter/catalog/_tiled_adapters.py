"""Adapters whose change repeats a small block, or fills a large one from a vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter._registry import register
from rewriter.catalog._adapter import Adapter, require_rank, zeros
from rewriter.catalog._maps._precision import widen
from rewriter.errors import RewriterError


@register("c3a")
class C3A(Adapter):
    """Add a matrix of circulant blocks, each filled from a vector: row i is the vector, shifted by i.

    >>> import torch
    >>> adapter = C3A(block_size=2, weight=torch.randn(6, 4))
    >>> adapter.c3a_kernel.shape
    torch.Size([3, 2, 2])

    Arguments:
        block_size: of a block; divides both dimensions.
        init_weights: start with a change of zero; else with random entries.
        weight: of shape ``(out, in, ...)``, seen as ``out x (in · ...)``; filled in by the site.

    Raises:
        RewriterError: the blocks do not tile the weight, or it is a vector.
    """

    cost = "one pass over the tensor"
    reference = "Chen et al. 2024, arXiv:2407.19342; peft C3AConfig"

    def __init__(self, block_size: int = 256, init_weights: bool = True, *, weight: Tensor) -> None:
        super().__init__("c3a", weight)
        if block_size < 1 or self.rows % block_size or self.columns % block_size:
            raise RewriterError(
                f"c3a's blocks of {block_size} do not tile a matrix of {self.rows} x {self.columns}"
            )
        self.c3a_kernel = zeros(weight, (self.rows // block_size, self.columns // block_size, block_size))
        if not init_weights:
            nn.init.xavier_uniform_(self.c3a_kernel)
        places = torch.arange(block_size, device=weight.device)
        self.register_buffer("shifts", (places[None, :] - places[:, None]) % block_size, persistent=False)
        self.shifts: Tensor

    def delta(self) -> Tensor:
        blocks = widen(self.c3a_kernel)[:, :, self.shifts]
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1) / self.columns


@register("miss")
class MiSS(Adapter):
    """Add one block of `r` columns again and again, side by side (matrix shard sharing).

    >>> import torch
    >>> adapter = MiSS(r=2, weight=torch.randn(6, 5))
    >>> adapter.miss_block.shape
    torch.Size([2, 6])

    Arguments:
        r: number of columns in the block.
        weight: of shape ``(out, in, ...)``, seen as ``out x (in · ...)``; filled in by the site.

    Raises:
        RewriterError: the rank is not positive, or the weight is a vector.
    """

    cost = "one pass over the tensor"
    reference = "Kang and Yin 2024, arXiv:2409.15371; peft MissConfig"

    def __init__(self, r: int = 64, *, weight: Tensor) -> None:
        super().__init__("miss", weight)
        require_rank("miss", r)
        self.times = -(-self.columns // r)
        self.miss_block = zeros(weight, (r, self.rows))

    def delta(self) -> Tensor:
        return widen(self.miss_block).mT.repeat(1, self.times)[:, : self.columns]
