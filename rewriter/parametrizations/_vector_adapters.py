"""Adapters that train vectors: a factor per row or column, or the scales of fixed or factored directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rewriter.parametrizations._adapter import FRESH, Adapter, matrix_shape, normal, require_rank, zeros
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._precision import widen


@register("ia3")
class IA3(nn.Module):
    """Multiply each row of a base that is not trained, or each of its columns, by a trained factor.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.equal(IA3(weight=weight)(weight), weight)
    True

    PEFT scales a layer's output, so where the rows are scaled select the bias too.

    Arguments:
        feedforward: scale the inputs (dimension 1) instead of the outputs (dimension 0).
        weight: of shape ``(out, ...)``, filled in by the site.

    Raises:
        RewriterError: `feedforward` and the weight is a vector.
    """

    guarantee = FRESH
    cost = "one multiplication per entry"
    reference = "Liu et al. 2022, arXiv:2205.05638; peft IA3Config"
    freezes_original = True

    def __init__(self, feedforward: bool = False, *, weight: Tensor) -> None:
        super().__init__()
        dim = 1 if feedforward else 0
        if feedforward:
            matrix_shape("ia3 with feedforward", weight)
        shape = [n if i == dim else 1 for i, n in enumerate(weight.shape)]
        self.ia3_l = nn.Parameter(zeros(weight, shape).detach() + 1)

    def forward(self, X: Tensor) -> Tensor:
        return (widen(X) * widen(self.ia3_l)).to(X.dtype)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return value / factors; not finite where a factor is zero."""
        return (widen(value) / widen(self.ia3_l)).to(value.dtype)


@register("adalora")
class AdaLora(Adapter):
    """Add a change in the form of a singular value decomposition: W + (lora_alpha / r) · B diag(E) A.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> AdaLora(r=2, weight=weight).lora_E.shape
    torch.Size([2, 1])

    Only the form: the schedule that gives ranks to the layers is a matter of the training loop, which sets
    entries of ``lora_E`` to zero.

    Arguments:
        r: rank of the change.
        lora_alpha: numerator of its scale.
        weight: of shape ``(out, in, ...)``, filled in by the site.

    Raises:
        RewriterError: the rank is not positive, or the weight is a vector.
    """

    cost = "O(r · entries)"
    reference = "Zhang et al. 2023, arXiv:2303.10512; peft AdaLoraConfig"

    def __init__(self, r: int = 8, lora_alpha: float = 8, *, weight: Tensor) -> None:
        super().__init__("adalora", weight)
        require_rank("adalora", r)
        self.scaling = lora_alpha / (r + 1e-5)
        self.lora_A = normal(weight, (r, self.columns), std=0.02)
        self.lora_E = zeros(weight, (r, 1))
        self.lora_B = normal(weight, (self.rows, r), std=0.02)

    def delta(self) -> Tensor:
        return widen(self.lora_B) @ (widen(self.lora_A) * widen(self.lora_E)) * self.scaling


@register("vera")
class Vera(Adapter):
    """Add a fixed random low-rank matrix of which only two vectors are trained: W + diag(b) B diag(d) A.

    >>> import torch
    >>> adapter = Vera(r=2, weight=torch.randn(6, 4))
    >>> sorted(name for name, _ in adapter.named_parameters())
    ['vera_lambda_b', 'vera_lambda_d']

    Arguments:
        r: rank of the change.
        d_initial: start of the vector d; b starts at zero.
        projection_prng_key: seed of the random matrices; sites of equal shape get equal ones.
        weight: of shape ``(out, in, ...)``, filled in by the site.

    Raises:
        RewriterError: the rank is not positive, or the weight is a vector.
    """

    cost = "O(r · entries)"
    reference = "Kopiczko, Blankevoort, Asano 2023, arXiv:2310.11454; peft VeraConfig"

    def __init__(self, r: int = 256, d_initial: float = 0.1, projection_prng_key: int = 0, *, weight: Tensor) -> None:
        super().__init__("vera", weight)
        require_rank("vera", r)
        generator = torch.Generator().manual_seed(projection_prng_key)
        self.register_buffer("vera_A", _projection((r, self.columns), generator).to(zeros(weight, ())))
        self.register_buffer("vera_B", _projection((self.rows, r), generator).to(zeros(weight, ())))
        self.vera_A: Tensor
        self.vera_B: Tensor
        self.vera_lambda_d = nn.Parameter(torch.full_like(self.vera_A[:, :1], d_initial))
        self.vera_lambda_b = zeros(weight, (self.rows, 1))

    def delta(self) -> Tensor:
        wide_A = widen(self.vera_lambda_d) * widen(self.vera_A)
        return widen(self.vera_lambda_b) * widen(self.vera_B) @ wide_A


def _projection(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    matrix = torch.empty(shape)
    bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(shape[1])
    return matrix.uniform_(-bound, bound, generator=generator)
