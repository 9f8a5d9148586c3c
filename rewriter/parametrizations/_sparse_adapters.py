"""Adapters that train a few entries: of the weight itself, of its rows, or of its spectrum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._adapter import FRESH, Adapter, require_rank, zeros
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._precision import widen


@register("shira")
class Shira(Adapter):
    """Add a change to few entries of the weight, at places drawn once.

    >>> import torch
    >>> weight = torch.zeros(6, 4)
    >>> adapter = Shira(r=1, weight=weight)
    >>> adapter.shira_weight.shape
    torch.Size([10])

    Arguments:
        r: as many entries are trained as LoRA of rank `r` has parameters: r · (out + in).
        random_seed: seed of the places; none: torch's own generator.
        weight: of shape ``(out, in, ...)``, filled in by the site.

    Raises:
        RewriterError: there are fewer entries than that, or the weight is a vector.
    """

    cost = "one pass over the tensor"
    reference = "Bhardwaj et al. 2024, arXiv:2406.13175; peft ShiraConfig"

    def __init__(self, r: int = 32, random_seed: int | None = None, *, weight: Tensor) -> None:
        super().__init__("shira", weight)
        require_rank("shira", r)
        count = r * (self.rows + self.columns)
        chosen = places(self.rows * self.columns, count, random_seed)
        self.register_buffer("shira_indices", chosen.to(weight.device))
        self.shira_indices: Tensor
        self.shira_weight = zeros(weight, (count,))

    def delta(self) -> Tensor:
        return scattered(widen(self.shira_weight), self.shira_indices, self.rows, self.columns)


@register("fourierft")
class FourierFT(Adapter):
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
        weight: of shape ``(out, in, ...)``, seen as ``out x (in · ...)``; filled in by the site.

    Raises:
        RewriterError: the matrix has fewer entries than `n_frequency`, or the weight is a vector.
    """

    cost = "O(entries · log entries)"
    reference = "Gao et al. 2024, arXiv:2405.03003; peft FourierFTConfig"

    def __init__(
        self,
        n_frequency: int = 1000,
        scaling: float = 150.0,
        random_loc_seed: int = 777,
        init_weights: bool = True,
        *,
        weight: Tensor,
    ) -> None:
        super().__init__("fourierft", weight)
        self.scaling = float(scaling)
        chosen = places(self.rows * self.columns, n_frequency, random_loc_seed)
        self.register_buffer("indices", chosen.to(weight.device))
        self.indices: Tensor
        self.fourierft_spectrum = zeros(weight, (n_frequency,))
        if not init_weights:
            nn.init.normal_(self.fourierft_spectrum)

    def delta(self) -> Tensor:
        spectrum = scattered(widen(self.fourierft_spectrum), self.indices, self.rows, self.columns)
        delta: Tensor = torch.fft.ifft2(spectrum).real * self.scaling
        return delta


@register("trainable_tokens")
class TrainableTokens(nn.Module):
    """Train some rows of a base (the tokens of an embedding) and leave the others as they are.

    >>> import torch
    >>> adapter = TrainableTokens([0, 2], weight=torch.randn(5, 3))
    >>> adapter.trainable_tokens_delta.shape
    torch.Size([2, 3])

    Assigning a value sets these rows too.

    Arguments:
        token_indices: which rows.
        weight: of shape ``(rows, ...)``, filled in by the site.

    Raises:
        RewriterError: there is no such row, or one is named twice.
    """

    guarantee = FRESH + "; the other rows are the base's"
    cost = "one copy of the tensor"
    reference = "peft TrainableTokensConfig"
    freezes_original = True

    def __init__(self, token_indices: Sequence[int], *, weight: Tensor) -> None:
        super().__init__()
        rows = weight.shape[0] if weight.dim() else 0
        wrong = [i for i in token_indices if not 0 <= i < rows]
        if wrong or len(set(token_indices)) != len(token_indices):
            found = f"{wrong} are none" if wrong else "some are named twice"
            raise RewriterError(f"token_indices are different rows of a weight with {rows} rows: {found}")
        indices = torch.tensor(list(token_indices), dtype=torch.int64, device=weight.device)
        self.register_buffer("token_indices", indices)
        self.token_indices: Tensor
        self.trainable_tokens_delta = nn.Parameter(weight.detach()[indices].clone())

    def forward(self, X: Tensor) -> Tensor:
        return X.index_copy(0, self.token_indices, self.trainable_tokens_delta.to(X.dtype))

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value`, and set the trained rows to its own."""
        self.trainable_tokens_delta.copy_(value[self.token_indices])
        return value


def places(entries: int, count: int, seed: int | None) -> Tensor:
    """Return `count` different numbers below `entries`, drawn with `seed`.

    Raises:
        RewriterError: there are not so many.
    """
    if not 1 <= count <= entries:
        raise RewriterError(f"cannot choose {count} of the {entries} entries of the weight")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randperm(entries, generator=generator)[:count]


def scattered(entries: Tensor, indices: Tensor, rows: int, columns: int) -> Tensor:
    """Return a matrix of zeros with `entries` at the flat `indices`."""
    flat = torch.zeros(rows * columns, dtype=entries.dtype, device=entries.device)
    return flat.index_copy(0, indices, entries).view(rows, columns)
