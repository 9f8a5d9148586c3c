"""Adapters that train few numbers: entries of the weight, of its rows or its spectrum, and repeated blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._adapter import FRESH, Adapter, Frozen
from rewriter.parametrizations.maths._precision import widen


class _Scattered(Adapter):
    def draw(self, buffer: str, count: int, seed: int | None) -> None:
        """Register as `buffer` the flat indices of `count` different entries, drawn with `seed`."""
        entries = self.rows * self.columns
        if not 1 <= count <= entries:
            raise RewriterError(f"cannot choose {count} of the {entries} entries of the weight")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.register_buffer(buffer, torch.randperm(entries, generator=generator)[:count].to(self.device))

    def scattered(self, entries: Tensor, indices: Tensor) -> Tensor:
        """Return a matrix of zeros with `entries` at the flat `indices`."""
        flat = torch.zeros(self.rows * self.columns, dtype=entries.dtype, device=entries.device)
        return flat.index_copy(0, indices, entries).view(self.rows, self.columns)


class Shira(_Scattered, name="shira"):
    """Add a change to few entries of the weight, at places drawn once.

    >>> import torch
    >>> weight = torch.zeros(6, 4)
    >>> adapter = Shira(r=1, weight=weight)
    >>> adapter.shira_weight.shape
    torch.Size([10])

    Arguments:
        r: as many entries are trained as LoRA of rank `r` has parameters: r · (out + in).
        random_seed: seed of the places; none: torch's own generator.
    """

    cost = "one pass over the tensor"
    reference = "Bhardwaj et al. 2024, arXiv:2406.13175; peft ShiraConfig"

    r: int = 32
    random_seed: int | None = None

    def start(self, weight: Tensor) -> None:
        count = self.r * (self.rows + self.columns)
        self.draw("shira_indices", count, self.random_seed)
        self.shira_indices: Tensor
        self.shira_weight = self.zeros(count)

    def delta(self) -> Tensor:
        return self.scattered(widen(self.shira_weight), self.shira_indices)


class FourierFT(_Scattered, name="fourierft"):
    """Add a matrix whose spectrum has few entries that are not zero: W + scaling · Re IFFT2(sparse spectrum).

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.equal(FourierFT(n_frequency=3, weight=weight)(weight), weight)
    True

    Arguments:
        n_frequency: number of entries of the spectrum that are trained.
        scaling: factor of the change.
        random_loc_seed: seed of their places.
        init_weights: start with a change of zero; else with random entries.
    """

    cost = "O(entries · log entries)"
    reference = "Gao et al. 2024, arXiv:2405.03003; peft FourierFTConfig"

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    init_weights: bool = True

    def start(self, weight: Tensor) -> None:
        self.draw("indices", self.n_frequency, self.random_loc_seed)
        self.indices: Tensor
        self.fourierft_spectrum = self.zeros(self.n_frequency)
        if not self.init_weights:
            nn.init.normal_(self.fourierft_spectrum)

    def delta(self) -> Tensor:
        spectrum = self.scattered(widen(self.fourierft_spectrum), self.indices)
        delta: Tensor = torch.fft.ifft2(spectrum).real * self.scaling
        return delta


class TrainableTokens(Frozen, name="trainable_tokens"):
    """Train some rows of a base (the tokens of an embedding) and leave the others unchanged.

    >>> import torch
    >>> adapter = TrainableTokens([0, 2], weight=torch.randn(5, 3))
    >>> adapter.trainable_tokens_delta.shape
    torch.Size([2, 3])

    Assigning a value sets these rows too.

    Arguments:
        token_indices: which rows.
    """

    guarantee = FRESH + "; the other rows are the base's"
    cost = "one copy of the tensor"
    reference = "peft TrainableTokensConfig"
    least_dims = 0

    token_indices: Sequence[int]

    def start(self, weight: Tensor) -> None:
        chosen = list(self.token_indices)
        wrong = [i for i in chosen if not 0 <= i < self.rows]
        if wrong or len(set(chosen)) != len(chosen):
            found = f"{wrong} are none" if wrong else "some are named twice"
            raise RewriterError(f"token_indices are different rows of a weight with {self.rows} rows: {found}")
        del self.token_indices
        self.register_buffer("token_indices", torch.tensor(chosen, dtype=torch.int64, device=weight.device))
        self.trainable_tokens_delta = nn.Parameter(weight.detach()[chosen].clone())

    def forward(self, X: Tensor) -> Tensor:
        rows = self.trainable_tokens_delta.to(X.dtype)
        return X.index_copy(0, self.token_indices, rows)  # type: ignore[arg-type]

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value`, and set the trained rows to its own."""
        self.trainable_tokens_delta.copy_(value[self.token_indices])
        return value


class C3A(Adapter, name="c3a"):
    """Add a matrix of circulant blocks, each filled from a vector: row i is the vector, shifted by i.

    >>> import torch
    >>> adapter = C3A(block_size=2, weight=torch.randn(6, 4))
    >>> adapter.c3a_kernel.shape
    torch.Size([3, 2, 2])

    Arguments:
        block_size: of a block; divides both dimensions.
        init_weights: start with a change of zero; else with random entries.
    """

    cost = "one pass over the tensor"
    reference = "Chen et al. 2024, arXiv:2407.19342; peft C3AConfig"

    block_size: int = 256
    init_weights: bool = True

    def start(self, weight: Tensor) -> None:
        size = self.block_size
        if size < 1 or self.rows % size or self.columns % size:
            raise RewriterError(f"c3a's blocks of {size} do not tile a matrix of {self.rows} x {self.columns}")
        self.c3a_kernel = self.zeros(self.rows // size, self.columns // size, size)
        if not self.init_weights:
            nn.init.xavier_uniform_(self.c3a_kernel)
        places = torch.arange(size, device=weight.device)
        self.register_buffer("shifts", (places[None, :] - places[:, None]) % size, persistent=False)
        self.shifts: Tensor

    def delta(self) -> Tensor:
        blocks = widen(self.c3a_kernel)[:, :, self.shifts]
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1) / self.columns


class MiSS(Adapter, name="miss"):
    """Add one block of `r` columns repeatedly, side by side (matrix shard sharing).

    >>> import torch
    >>> adapter = MiSS(r=2, weight=torch.randn(6, 5))
    >>> adapter.miss_block.shape
    torch.Size([2, 6])

    Arguments:
        r: number of columns in the block.
    """

    cost = "one pass over the tensor"
    reference = "Kang and Yin 2024, arXiv:2409.15371; peft MissConfig"

    r: int = 64

    def start(self, weight: Tensor) -> None:
        self.times = -(-self.columns // self.r)
        self.miss_block = self.zeros(self.r, self.rows)

    def delta(self) -> Tensor:
        return widen(self.miss_block).mT.repeat(1, self.times)[:, : self.columns]


class GraLoRA(Adapter, name="gralora"):
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
    """

    cost = "O(r · entries / k)"
    reference = "Jung et al. 2025, arXiv:2505.20355; peft GraloraConfig"

    r: int = 32
    alpha: float = 64
    gralora_k: int = 2

    def start(self, weight: Tensor) -> None:
        k, r = self.gralora_k, self.r
        if k < 1 or self.rows % k or self.columns % k or r % k:
            raise RewriterError(f"gralora_k {k} does not divide r={r}, or a matrix of {self.rows} x {self.columns}")
        self.scaling = self.alpha / r
        self.gralora_A = nn.Parameter(self.kaiming(k, r, self.columns // k).detach().mT.contiguous())
        self.gralora_B = self.zeros(k, r, self.rows // k)

    def delta(self) -> Tensor:
        A = torch.unflatten(widen(self.gralora_A), 2, [self.gralora_k, -1])
        B = torch.unflatten(widen(self.gralora_B), 1, [self.gralora_k, -1])
        tiles = torch.einsum("nikq,knqo->koni", A, B)
        return tiles.flatten(2).flatten(0, 1) * self.scaling
