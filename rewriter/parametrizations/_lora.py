"""LoRA and what is built on it: a low-rank change of a base that is not trained."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._adapter import Adapter, kaiming, require_rank, zeros
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._precision import widen

LoraStart = bool | Literal["gaussian", "pissa", "olora", "orthogonal"]


@register("lora")
class Lora(Adapter):
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
            weight less the change, so the value stays what it was.
        use_rslora: scale with lora_alpha / sqrt(r).
        weight: of shape ``(out, in, ...)``, seen as ``out x (in · ...)``; filled in by the site.

    Raises:
        RewriterError: the rank does not fit the weight or the start, or the weight is a vector.
    """

    cost = "O(r · entries)"
    reference = "Hu et al. 2021, arXiv:2106.09685; PiSSA: arXiv:2404.02948; OLoRA: arXiv:2406.01775; peft LoraConfig"

    def __init__(
        self,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        init_lora_weights: LoraStart = True,
        use_rslora: bool = False,
        *,
        weight: Tensor,
    ) -> None:
        super().__init__("lora", weight)
        require_rank("lora", r)
        self.r, self.lora_dropout = r, float(lora_dropout)
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.random = self.lora_dropout > 0
        self.lora_A, self.lora_B = _start(init_lora_weights, r, self.scaling, weight)

    def delta(self) -> Tensor:
        return widen(self.lora_B) @ widen(self.lora_A) * self.scaling

    def drop(self, delta: Tensor) -> Tensor:
        return delta * F.dropout(torch.ones_like(delta[0]), self.lora_dropout, self.training)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


@register("dora")
class Dora(Lora):
    """Train each row's length on its own and its direction with LoRA: m · V / ‖V‖, V as ``lora`` gives it.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> adapter = Dora(r=2, weight=weight)
    >>> torch.allclose(adapter(weight), weight)
    True

    As in the paper and in PEFT no gradient flows through the norm. Assigning a value sets the lengths too.

    Arguments:
        r, lora_alpha, lora_dropout, init_lora_weights, use_rslora, weight: as for ``lora``.

    Raises:
        RewriterError: as ``lora``.
    """

    reference = "Liu et al. 2024, arXiv:2402.09353; peft LoraConfig(use_dora=True)"

    def __init__(
        self,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        init_lora_weights: LoraStart = True,
        use_rslora: bool = False,
        *,
        weight: Tensor,
    ) -> None:
        super().__init__(r, lora_alpha, lora_dropout, init_lora_weights, use_rslora, weight=weight)
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


def _start(start: LoraStart, r: int, scaling: float, weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    W = widen(weight.detach()).flatten(1)
    A, B = kaiming(weight, (r, W.shape[1])), zeros(weight, (W.shape[0], r))
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
    return A, B


def _row_norms(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix.flatten(1), dim=1, keepdim=True)
    return norms.clamp_min(1e-37)
