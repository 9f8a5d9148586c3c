"""What a LoRA layer of PEFT adds to a weight, as a parametrization over the layer's own parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankChange(nn.Module):
    """Add ``scaling · B A`` to a weight, in the layout that a PEFT layer keeps A and B in.

    Arguments:
        A: of a linear layer ``(r, in)``; of a convolution ``(r, in, …)``; of an embedding ``(r, number)``; of
            stacked experts ``(experts · r, in)``.
        B: ``(out, r)``; of a convolution ``(out, r, 1, …)``; of stacked experts ``(out, r · experts)``.
        scaling: the factor.
        layout: ``"linear"``, ``"transposed"`` (the weight is ``(in, out)``), ``"conv"``, ``"embedding"``,
            ``"experts"`` (``(experts, out, in)``) or ``"experts_transposed"``.
        experts: how many.
        dropout: while training, an input feature is left out of the change with this probability, the same ones for
            a whole forward. PEFT draws again for each sample; a weight cannot.
        magnitude: of DoRA: the lengths of the outputs' rows.
    """

    freezes_original = True

    def __init__(
        self,
        A: nn.Parameter,
        B: nn.Parameter,
        scaling: float,
        layout: str,
        experts: int = 1,
        dropout: float = 0.0,
        magnitude: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.lora_A, self.lora_B = A, B
        self.magnitude = magnitude
        self.scaling, self.layout, self.experts, self.dropout = float(scaling), layout, experts, dropout
        self.random = dropout > 0

    def forward(self, X: Tensor) -> Tensor:
        delta = self.delta().reshape(X.shape).to(X.dtype)
        magnitude = self.magnitude
        if magnitude is None:
            return X + delta
        changed = X + delta
        rows = self.rows(changed)
        # As in PEFT no gradient flows through the norm.
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True).detach()
        scaled: Tensor = rows * (magnitude.reshape(-1, 1) / norm)
        if self.layout == "transposed":
            scaled = scaled.mT
        return scaled.reshape(X.shape).to(X.dtype)

    def rows(self, X: Tensor) -> Tensor:
        """Return a matrix with one row for each output."""
        return X.mT if self.layout == "transposed" else X.flatten(1)

    def delta(self) -> Tensor:
        """Return what is added."""
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        if self.training and self.dropout > 0.0:
            mask = F.dropout(torch.ones_like(A.flatten(2)[0, :, :1] if A.dim() > 2 else A[0]), self.dropout)
            A = A * (mask.reshape([1, -1] + [1] * (A.dim() - 2)))
        if self.layout.startswith("experts"):
            A = A.reshape(self.experts, -1, A.shape[-1])
            B = B.reshape(B.shape[0], -1, self.experts)
            change = torch.einsum("ore,eri->eoi", B, A)
            if self.layout == "experts_transposed":
                change = change.mT
        else:
            change = B.flatten(1) @ A.flatten(1)
            if self.layout in ("transposed", "embedding"):
                change = change.mT
        return change * self.scaling

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the base: `value` without the change."""
        if self.magnitude is not None:
            norms = torch.linalg.vector_norm(self.rows(value), dim=1)
            self.magnitude.copy_(norms.reshape(self.magnitude.shape))
        return value - self.delta().reshape(value.shape).to(value.dtype)

    def extra_repr(self) -> str:
        return f"{self.layout}, scaling={self.scaling:g}"
