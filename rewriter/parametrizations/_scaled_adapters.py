"""Low-rank adapters that scale: the base by a low-rank factor, or a change of bounded size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter.parametrizations._adapter import FRESH, Adapter, kaiming, matrix_shape, require_rank, zeros
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._precision import Precise, widen


@register("hira")
class HiRA(Precise):
    """Multiply each entry of a base that is not trained by a low-rank factor: W ⊙ (1 + B A).

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.equal(HiRA(r=2, weight=weight)(weight), weight)
    True

    Arguments:
        r: rank of B A.
        weight: of shape ``(out, in, ...)``, seen as ``out x (in · ...)``; filled in by the site.

    Raises:
        RewriterError: the rank is not positive, or the weight is a vector.
    """

    guarantee = FRESH
    cost = "O(r · entries)"
    reference = "Huang et al. 2025, HiRA (ICLR); peft HiraConfig"
    freezes_original = True

    def __init__(self, r: int = 32, *, weight: Tensor) -> None:
        super().__init__()
        require_rank("hira", r)
        rows, columns = matrix_shape("hira", weight)
        self.hira_A, self.hira_B = kaiming(weight, (r, columns)), zeros(weight, (rows, r))

    def value(self, X: Tensor) -> Tensor:
        factor = 1 + widen(self.hira_B) @ widen(self.hira_A)
        return X * factor.reshape(X.shape)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return value / factor; not finite where the factor is zero."""
        factor = 1 + widen(self.hira_B) @ widen(self.hira_A)
        return (widen(value) / factor.reshape(value.shape)).to(value.dtype)


@register("delora")
class DeLoRA(Adapter):
    """Add a low-rank change whose size is a trained number, apart from its direction.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.equal(DeLoRA(r=2, weight=weight)(weight), weight)
    True

    The change is B D A scaled by the norms of the weight's columns, D the diagonal of λ / (r ‖aᵢ‖ ‖bᵢ‖).

    Arguments:
        r: rank of the change.
        delora_lambda: start of λ.
        weight: of shape ``(out, in, ...)``, seen as ``out x (in · ...)``; filled in by the site.

    Raises:
        RewriterError: the rank is not positive, or the weight is a vector.
    """

    guarantee = FRESH + "; relative to the columns' norms the change has Frobenius norm at most λ"
    cost = "O(r · entries)"
    reference = "Bini et al. 2025, arXiv:2503.18225; peft DeloraConfig"

    def __init__(self, r: int = 8, delora_lambda: float = 15.0, *, weight: Tensor) -> None:
        super().__init__("delora", weight)
        require_rank("delora", r)
        self.r = r
        self.delora_A, self.delora_B = kaiming(weight, (r, self.columns)), zeros(weight, (self.rows, r))
        self.delora_lambda = nn.Parameter(torch.full_like(self.delora_A[0, :1], delora_lambda))
        norms = torch.linalg.vector_norm(widen(weight.detach()).flatten(1), dim=0)
        self.register_buffer("delora_w_norm", norms)
        self.delora_w_norm: Tensor

    def delta(self) -> Tensor:
        A, B = widen(self.delora_A), widen(self.delora_B)
        lengths_A = torch.linalg.vector_norm(A, dim=1).clamp_min(1e-4)
        lengths_B = torch.linalg.vector_norm(B, dim=0).clamp_min(1e-4)
        scale = widen(self.delora_lambda) / (self.r * lengths_A * lengths_B)
        delta: Tensor = (B * scale) @ A * widen(self.delora_w_norm)
        return delta
