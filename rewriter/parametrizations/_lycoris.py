"""Adapters whose change is an elementwise or a Kronecker product of small matrices."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rewriter.parametrizations._adapter import Adapter, kaiming, kept_rows, require_rank, zeros
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._precision import widen


class _Dropped(Adapter):
    def __init__(self, name: str, weight: Tensor, rank_dropout: float, module_dropout: float) -> None:
        super().__init__(name, weight)
        self.rank_dropout, self.module_dropout = float(rank_dropout), float(module_dropout)
        self.rank_dropout_scale = True
        self.random = rank_dropout > 0 or module_dropout > 0

    def drop(self, delta: Tensor) -> Tensor:
        if self.rank_dropout > 0:
            delta = delta * kept_rows(self.rows, self.rank_dropout, self.rank_dropout_scale, delta)
        if self.module_dropout > 0:
            delta = delta * (torch.rand((), device=delta.device) > self.module_dropout).to(delta.dtype)
        return delta


@register("loha")
class LoHa(_Dropped):
    """Add the elementwise product of two low-rank matrices: W + (alpha / r) · (A₁ B₁) ⊙ (A₂ B₂).

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.equal(LoHa(r=2, weight=weight)(weight), weight)
    True

    Arguments:
        r: rank of each factor; the change has rank up to r².
        alpha: numerator of its scale.
        rank_dropout: while training, rows of the change are zero with this probability.
        module_dropout: while training, the whole change is zero with this probability.
        init_weights: start with a change of zero; else all four matrices are random.
        weight: of shape ``(out, in, ...)``, seen as ``out x (in · ...)``; filled in by the site.

    Raises:
        RewriterError: the rank is not positive, or the weight is a vector.
    """

    cost = "O(r · entries)"
    reference = "Hyeon-Woo, Ye-Bin, Oh 2021 (FedPara), arXiv:2108.06098; peft LoHaConfig"

    def __init__(
        self,
        r: int = 8,
        alpha: float = 8,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        init_weights: bool = True,
        *,
        weight: Tensor,
    ) -> None:
        super().__init__("loha", weight, rank_dropout, module_dropout)
        require_rank("loha", r)
        self.scaling = alpha / r
        self.hada_w1_a = kaiming(weight, (self.rows, r))
        self.hada_w1_b = kaiming(weight, (r, self.columns))
        self.hada_w2_a = kaiming(weight, (self.rows, r))
        self.hada_w2_b = (zeros if init_weights else kaiming)(weight, (r, self.columns))

    def delta(self) -> Tensor:
        first = widen(self.hada_w1_a) @ widen(self.hada_w1_b)
        return first * (widen(self.hada_w2_a) @ widen(self.hada_w2_b)) * self.scaling


@register("lokr")
class LoKr(_Dropped):
    """Add the Kronecker product of two small, perhaps low-rank, matrices: W + (alpha / r) · A ⊗ B.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> adapter = LoKr(r=1, weight=weight)
    >>> adapter.lokr_w1.shape, adapter.lokr_w2_a.shape, adapter.lokr_w2_b.shape
    (torch.Size([2, 2]), torch.Size([3, 1]), torch.Size([1, 2]))

    Arguments:
        r: rank of a factored matrix.
        alpha: numerator of the scale.
        rank_dropout: while training, rows of the change are zero with this probability.
        module_dropout: while training, the whole change is zero with this probability.
        decompose_both: factor the first matrix too, where `r` is less than half its larger side.
        decompose_factor: size of the first matrix; -1 for about the square root of each dimension.
        rank_dropout_scale: divide by the share of rows that are kept.
        init_weights: ``true``: the first matrix is zero, ``lycoris``: the second, ``false``: none.
        weight: of shape ``(out, in, ...)``, filled in by the site.

    Raises:
        RewriterError: the rank is not positive, or the weight is a vector.
    """

    cost = "O(entries), and O(r · entries of the factors)"
    reference = "Yeh et al. 2023 (LyCORIS), arXiv:2309.14859; peft LoKrConfig"

    def __init__(
        self,
        r: int = 8,
        alpha: float = 8,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        decompose_both: bool = False,
        decompose_factor: int = -1,
        rank_dropout_scale: bool = False,
        init_weights: bool | Literal["lycoris"] = True,
        *,
        weight: Tensor,
    ) -> None:
        super().__init__("lokr", weight, rank_dropout, module_dropout)
        require_rank("lokr", r)
        self.scaling, self.rank_dropout_scale = alpha / r, rank_dropout_scale
        out_l, out_k = factorization(weight.shape[0], decompose_factor)
        in_m, in_n = factorization(weight.shape[1], decompose_factor)
        kernel = weight.shape[2:].numel()
        first = zeros if init_weights is True else kaiming
        last = zeros if init_weights == "lycoris" else kaiming
        self.lokr_w1 = self.lokr_w1_a = self.lokr_w1_b = None
        self.lokr_w2 = self.lokr_w2_a = self.lokr_w2_b = None
        if decompose_both and r < max(out_l, in_m) / 2:
            self.lokr_w1_a = first(weight, (out_l, r))
            self.lokr_w1_b = kaiming(weight, (r, in_m))
        else:
            self.lokr_w1 = first(weight, (out_l, in_m))
        if r < max(out_k, in_n) / 2:
            self.lokr_w2_a = kaiming(weight, (out_k, r))
            self.lokr_w2_b = last(weight, (r, in_n * kernel))
        else:
            self.lokr_w2 = last(weight, (out_k, in_n * kernel))

    def delta(self) -> Tensor:
        first = _whole(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b)
        return torch.kron(first, _whole(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b)) * self.scaling


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Return m and n with m · n = dimension: m the factor if it divides, else the largest m <= n it allows.

    >>> factorization(128), factorization(128, 4), factorization(250, 4), factorization(127)
    ((8, 16), (4, 32), (2, 125), (1, 127))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    best = max(m for m in range(1, int(dimension**0.5) + 1) if dimension % m == 0 and m <= max(limit, 1))
    return best, dimension // best


def _whole(matrix: nn.Parameter | None, left: nn.Parameter | None, right: nn.Parameter | None) -> Tensor:
    if matrix is not None:
        return widen(matrix)
    assert left is not None
    assert right is not None
    return widen(left) @ widen(right)
