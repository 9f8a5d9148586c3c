"""Adapters whose change repeats a small block, or fills a large one from a vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._adapter import Adapter, kaiming, require_rank, zeros
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._precision import widen


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
            raise RewriterError(f"c3a's blocks of {block_size} do not tile a matrix of {self.rows} x {self.columns}")
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


@register("gralora")
class GraLoRA(Adapter):
    """Cut the weight into k x k tiles and add a change of rank r / k to each (granular LoRA).

    >>> import torch
    >>> adapter = GraLoRA(r=4, gralora_k=2, weight=torch.randn(6, 8))
    >>> adapter.gralora_A.shape, adapter.gralora_B.shape
    (torch.Size([2, 4, 4]), torch.Size([2, 4, 3]))

    PEFT's hybrid form is this step and then ``lora``.

    Arguments:
        r: rank of all tiles of a row together; a multiple of `gralora_k`.
        alpha: numerator of the scale.
        gralora_k: number of tiles in either direction; divides both dimensions.
        weight: of shape ``(out, in, ...)``, seen as ``out x (in · ...)``; filled in by the site.

    Raises:
        RewriterError: the tiles or the rank do not fit, or the weight is a vector.
    """

    cost = "O(r · entries / k)"
    reference = "Jung et al. 2025, arXiv:2505.20355; peft GraloraConfig"

    def __init__(self, r: int = 32, alpha: float = 64, gralora_k: int = 2, *, weight: Tensor) -> None:
        super().__init__("gralora", weight)
        require_rank("gralora", r)
        if gralora_k < 1 or self.rows % gralora_k or self.columns % gralora_k or r % gralora_k:
            raise RewriterError(
                f"gralora_k {gralora_k} does not divide r={r}, or a matrix of {self.rows} x {self.columns}"
            )
        self.tiles, self.scaling = gralora_k, alpha / r
        start = kaiming(weight, (gralora_k, r, self.columns // gralora_k))
        self.gralora_A = nn.Parameter(start.detach().mT.contiguous())
        self.gralora_B = zeros(weight, (gralora_k, r, self.rows // gralora_k))

    def delta(self) -> Tensor:
        A = torch.unflatten(widen(self.gralora_A), 2, [self.tiles, -1])
        B = torch.unflatten(widen(self.gralora_B), 1, [self.tiles, -1])
        tiles = torch.einsum("nikq,knqo->koni", A, B)
        return tiles.flatten(2).flatten(0, 1) * self.scaling
