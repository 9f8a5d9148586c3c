"""Adapters that add a product of small matrices: LoRA and its family."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._adapter import Adapter
from rewriter.parametrizations.maths._precision import widen

LoraStart = bool | Literal["gaussian", "pissa", "olora", "orthogonal"]


class Lora(Adapter, name="lora"):
    """Add a low-rank change to a base that is not trained: W + (lora_alpha / r) · B A.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> adapter = Lora(r=2, weight=weight)
    >>> adapter.lora_B.shape, adapter.lora_A.shape
    (torch.Size([6, 2]), torch.Size([2, 4]))
    >>> torch.equal(adapter(weight), weight)
    True

    Arguments:
        r: rank of the change.
        lora_alpha: numerator of its scale.
        lora_dropout: while training, each input feature is left out of the change with this probability, the
            same ones for a whole forward (PEFT draws them for each sample).
        init_lora_weights: ``true``: A as ``nn.Linear`` draws it, B zero. ``gaussian``: A normal, B zero.
            ``pissa``: the leading singular triplets of the weight. ``olora``: the leading columns of its QR.
            ``orthogonal``: both random, with product zero. ``false``: both random. The base is always the
            weight less the change, so that the value does not change.
        use_rslora: scale with lora_alpha / sqrt(r).
    """

    reference = "Hu et al. 2021, arXiv:2106.09685; PiSSA: arXiv:2404.02948; OLoRA: arXiv:2406.01775; peft LoraConfig"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init_lora_weights: LoraStart = True
    use_rslora: bool = False

    def start(self, weight: Tensor) -> None:
        self.scaling = self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        self.random = self.lora_dropout > 0
        self.lora_A, self.lora_B = self.kaiming(self.r, self.columns), self.zeros(self.rows, self.r)
        _fill(self.init_lora_weights, self.lora_A, self.lora_B, self.scaling, weight)

    def delta(self) -> Tensor:
        return (widen(self.lora_B) * self.scaling) @ widen(self.lora_A)  # the factor on the smaller tensor

    def value(self, X: Tensor) -> Tensor:
        if X.dim() == 2 and not (self.training and self.lora_dropout > 0):
            return torch.addmm(X, widen(self.lora_B), widen(self.lora_A), alpha=self.scaling)
        delta = self.delta()
        return X + (self.drop(delta) if self.training else delta).reshape(X.shape)

    def linear(self, x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``F.linear(x, self(base), bias)`` without making the weight, so that it gets no gradient either.

        Arguments:
            x: of shape ``(..., in)``.
            base: of shape ``(out, in)``.
            bias: of shape ``(out,)``, or None.
        """
        if type(x) not in (Tensor, nn.Parameter) or x.dim() < 2:
            return F.linear(x, self(base), bias)
        rows = x.flatten(0, -2)
        small = F.linear(rows, self.lora_A.to(x.dtype))
        result = torch.addmm(F.linear(rows, base, bias), small, self.lora_B.to(x.dtype).t(), alpha=self.scaling)
        return result.view(*x.shape[:-1], base.shape[0]) if x.dim() > 2 else result

    def drop(self, delta: Tensor) -> Tensor:
        if self.lora_dropout == 0:
            return delta
        return delta * F.dropout(torch.ones_like(delta[0]), self.lora_dropout, self.training)


class Dora(Lora, name="dora"):
    """Train each row's length on its own and its direction with LoRA: m · V / ‖V‖, V as ``lora`` gives it.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> adapter = Dora(r=2, weight=weight)
    >>> torch.allclose(adapter(weight), weight)
    True

    As in the paper and in PEFT no gradient flows through the norm. Assigning a value sets the lengths too.

    Arguments:
        r, lora_alpha, lora_dropout, init_lora_weights, use_rslora: as for ``lora``.
    """

    reference = "Liu et al. 2024, arXiv:2402.09353; peft LoraConfig(use_dora=True)"

    def start(self, weight: Tensor) -> None:
        super().start(weight)
        self.magnitude = nn.Parameter(_row_norms(widen(weight.detach())))

    def value(self, X: Tensor) -> Tensor:
        delta = self.delta()
        norms = _row_norms((X.flatten(1) + delta).detach())
        if self.training:
            delta = self.drop(delta)
        return (widen(self.magnitude) / norms * (X.flatten(1) + delta)).reshape(X.shape)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the base, and set the lengths to those of `value`."""
        self.magnitude.copy_(_row_norms(widen(value)))
        return super().right_inverse(value)


def _fill(start: LoraStart, A: Tensor, B: Tensor, scaling: float, weight: Tensor) -> None:
    W, r = widen(weight.detach()).flatten(1), A.shape[0]
    if start in ("pissa", "olora") and r > min(W.shape):
        raise RewriterError(f"{start} starts from {r} columns of a weight whose matrix has shape {list(W.shape)}")
    if start == "orthogonal" and r % 2:
        raise RewriterError(f"the orthogonal start of lora needs an even r, not {r}")
    with torch.no_grad():
        if start is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        elif start == "gaussian":
            nn.init.normal_(A, std=1 / r)
        elif start == "pissa":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            root = (S[:r] / scaling).sqrt()
            A.copy_(root[:, None] * Vh[:r])
            B.copy_(U[:, :r] * root)
        elif start == "olora":
            Q, R = torch.linalg.qr(W)
            A.copy_(R[:r])
            B.copy_(Q[:, :r])
        elif start == "orthogonal":
            Q = torch.linalg.qr(torch.randn(r, r, dtype=A.dtype, device=A.device)).Q
            A.copy_((torch.randn_like(A[: r // 2]).mT @ Q[0::2]).mT / 10)
            B.copy_(torch.randn_like(B[:, : r // 2]) @ Q[1::2] / 10)


def _row_norms(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix.flatten(1), dim=1, keepdim=True)
    return norms.clamp_min(1e-37)


class AdaLora(Adapter, name="adalora"):
    """Add a change in the form of a singular value decomposition: W + (lora_alpha / r) · B diag(E) A.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> AdaLora(r=2, weight=weight).lora_E.shape
    torch.Size([2, 1])

    Only the form: the schedule of ranks belongs to the training loop, which sets entries of ``lora_E`` to zero.

    Arguments:
        r: rank of the change.
        lora_alpha: numerator of its scale.
    """

    reference = "Zhang et al. 2023, arXiv:2303.10512; peft AdaLoraConfig"

    r: int = 8
    lora_alpha: float = 8

    def start(self, weight: Tensor) -> None:
        self.scaling = self.lora_alpha / (self.r + 1e-5)
        self.lora_A = self.zeros(self.r, self.columns)
        self.lora_E = self.zeros(self.r, 1)
        self.lora_B = self.zeros(self.rows, self.r)
        for parameter in (self.lora_A, self.lora_B):
            nn.init.normal_(parameter, std=0.02)

    def delta(self) -> Tensor:
        return widen(self.lora_B) @ (widen(self.lora_A) * widen(self.lora_E)) * self.scaling


class Vera(Adapter, name="vera"):
    """Add a fixed random low-rank matrix of which only two vectors are trained: W + diag(b) B diag(d) A.

    >>> import torch
    >>> adapter = Vera(r=2, weight=torch.randn(6, 4))
    >>> sorted(name for name, _ in adapter.named_parameters())
    ['vera_lambda_b', 'vera_lambda_d']

    Arguments:
        r: rank of the change.
        d_initial: start of the vector d; b starts at zero.
        projection_prng_key: seed of the random matrices; sites of equal shape get equal ones.
    """

    reference = "Kopiczko, Blankevoort, Asano 2023, arXiv:2310.11454; peft VeraConfig"

    r: int = 256
    d_initial: float = 0.1
    projection_prng_key: int = 0

    def start(self, weight: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.projection_prng_key)
        for name, shape in (("vera_A", (self.r, self.columns)), ("vera_B", (self.rows, self.r))):
            bound = math.sqrt(6.0 / shape[1])
            matrix = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, matrix.to(self.zeros()))
        self.vera_A: Tensor
        self.vera_B: Tensor
        self.vera_lambda_d = nn.Parameter(torch.full_like(self.vera_A[:, :1], self.d_initial))
        self.vera_lambda_b = self.zeros(self.rows, 1)

    def delta(self) -> Tensor:
        wide_A = widen(self.vera_lambda_d) * widen(self.vera_A)
        return widen(self.vera_lambda_b) * widen(self.vera_B) @ wide_A


class _Dropped(Adapter):
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    def start(self, weight: Tensor) -> None:
        self.random = self.rank_dropout > 0 or self.module_dropout > 0
        self.scaling = self.alpha / self.r
        self.rescaled: bool = getattr(self, "rank_dropout_scale", True)

    def drop(self, delta: Tensor) -> Tensor:
        if self.rank_dropout > 0:
            mask = (torch.rand(self.rows, 1, device=delta.device) > self.rank_dropout).to(delta.dtype)
            delta = delta * (mask / mask.mean().clamp_min(1 / (2 * self.rows)) if self.rescaled else mask)
        if self.module_dropout > 0:
            delta = delta * (torch.rand((), device=delta.device) > self.module_dropout).to(delta.dtype)
        return delta


class LoHa(_Dropped, name="loha"):
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
    """

    reference = "Hyeon-Woo, Ye-Bin, Oh 2021 (FedPara), arXiv:2108.06098; peft LoHaConfig"

    init_weights: bool = True

    def start(self, weight: Tensor) -> None:
        super().start(weight)
        self.hada_w1_a, self.hada_w1_b = self.kaiming(self.rows, self.r), self.kaiming(self.r, self.columns)
        self.hada_w2_a = self.kaiming(self.rows, self.r)
        self.hada_w2_b = (self.zeros if self.init_weights else self.kaiming)(self.r, self.columns)

    def delta(self) -> Tensor:
        first = widen(self.hada_w1_a) @ widen(self.hada_w1_b)
        return first * (widen(self.hada_w2_a) @ widen(self.hada_w2_b)) * self.scaling


class LoKr(_Dropped, name="lokr"):
    """Add the Kronecker product of two small, perhaps low-rank, matrices: W + (alpha / r) · A ⊗ B.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> adapter = LoKr(r=1, weight=weight)
    >>> adapter.lokr_w1.shape, adapter.lokr_w2_a.shape, adapter.lokr_w2_b.shape
    (torch.Size([2, 2]), torch.Size([3, 1]), torch.Size([1, 2]))

    Arguments:
        r: rank of a factored matrix.
        alpha, rank_dropout, module_dropout: as for ``loha``.
        decompose_both: factor the first matrix too, if `r` is less than half its larger side.
        decompose_factor: size of the first matrix; -1 for about the square root of each dimension.
        rank_dropout_scale: divide by the share of rows that dropout leaves.
        init_weights: ``true``: the first matrix is zero, ``lycoris``: the second, ``false``: none.

    For the kernel of a Conv1d and a second matrix that is not factored, the product has its entries in PEFT's order.
    """

    cost = "O(entries), and O(r · entries of the factors)"
    reference = "Yeh et al. 2023 (LyCORIS), arXiv:2309.14859; peft LoKrConfig"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    def start(self, weight: Tensor) -> None:
        super().start(weight)
        r = self.r
        out_l, out_k = factorization(weight.shape[0], self.decompose_factor)
        in_m, in_n = factorization(weight.shape[1], self.decompose_factor)
        kernel = weight.shape[2:].numel()
        first = self.zeros if self.init_weights is True else self.kaiming
        last = self.zeros if self.init_weights == "lycoris" else self.kaiming
        self.lokr_w1 = self.lokr_w1_a = self.lokr_w1_b = None
        self.lokr_w2 = self.lokr_w2_a = self.lokr_w2_b = None
        if self.decompose_both and r < max(out_l, in_m) / 2:
            self.lokr_w1_a, self.lokr_w1_b = first(out_l, r), self.kaiming(r, in_m)
        else:
            self.lokr_w1 = first(out_l, in_m)
        if r < max(out_k, in_n) / 2:
            self.lokr_w2_a, self.lokr_w2_b = self.kaiming(out_k, r), last(r, in_n * kernel)
        else:
            self.lokr_w2 = last(out_k, in_n * kernel)

    def delta(self) -> Tensor:
        first = _whole(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b)
        second = _whole(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b)
        if self.lokr_w2 is not None and self.shape is not None and len(self.shape) == 3:
            # PEFT multiplies the first matrix with a kernel of three dimensions here, and kron aligns the last ones.
            second = second.reshape(second.shape[0], -1, self.shape[-1])
        return torch.kron(first, second) * self.scaling


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
