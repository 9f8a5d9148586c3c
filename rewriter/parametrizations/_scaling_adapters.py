"""Adapters that multiply or turn a base that is not trained, and one that scales its change."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._adapter import FRESH, Adapter, Frozen
from rewriter.parametrizations.maths._precision import widen


class _Factor(Frozen):
    """An adapter that multiplies each entry by a `factor` that broadcasts to the weight."""

    def factor(self, X: Tensor) -> Tensor:
        """Return the factors of X."""
        raise NotImplementedError

    def value(self, X: Tensor) -> Tensor:
        return X * self.factor(X)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return value / factor; not finite where the factor is zero."""
        return (widen(value) / self.factor(value)).to(value.dtype)


class IA3(_Factor, name="ia3"):
    """Multiply each row of a base that is not trained, or each of its columns, by a trained factor.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.equal(IA3(weight=weight)(weight), weight)
    True

    PEFT scales a layer's output, so if the rows are scaled select the bias too.

    Arguments:
        feedforward: scale the inputs (dimension 1) instead of the outputs (dimension 0).
    """

    cost = "one multiplication per entry"
    reference = "Liu et al. 2022, arXiv:2205.05638; peft IA3Config"
    least_dims = 0

    feedforward: bool = False

    def start(self, weight: Tensor) -> None:
        dim = 1 if self.feedforward else 0
        if weight.dim() <= dim:
            raise RewriterError(
                f"ia3 scales dimension {dim}, a weight of two or more dimensions with feedforward: true; this one has "
                f"shape {list(weight.shape)}"
            )
        self.ia3_l = nn.Parameter(self.zeros(*(n if i == dim else 1 for i, n in enumerate(weight.shape))).detach() + 1)

    def factor(self, X: Tensor) -> Tensor:
        return widen(self.ia3_l)


class HiRA(_Factor, name="hira"):
    """Multiply each entry of a base that is not trained by a low-rank factor: W ⊙ (1 + B A).

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.equal(HiRA(r=2, weight=weight)(weight), weight)
    True

    Arguments:
        r: rank of B A.
    """

    reference = "Huang et al. 2025, HiRA (ICLR); peft HiraConfig"

    r: int = 32

    def start(self, weight: Tensor) -> None:
        self.hira_A, self.hira_B = self.kaiming(self.r, self.columns), self.zeros(self.rows, self.r)

    def factor(self, X: Tensor) -> Tensor:
        return (1 + widen(self.hira_B) @ widen(self.hira_A)).reshape(X.shape)


class DeLoRA(Adapter, name="delora"):
    """Add a low-rank change whose size is a trained number, apart from its direction.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.equal(DeLoRA(r=2, weight=weight)(weight), weight)
    True

    The change is B D A scaled by the norms of the weight's columns, D the diagonal of λ / (r ‖aᵢ‖ ‖bᵢ‖).

    Arguments:
        r: rank of the change.
        delora_lambda: start of λ.
    """

    guarantee = FRESH + "; relative to the columns' norms the change has Frobenius norm at most λ"
    reference = "Bini et al. 2025, arXiv:2503.18225; peft DeloraConfig"

    r: int = 8
    delora_lambda: float = 15.0

    def start(self, weight: Tensor) -> None:
        self.delora_A, self.delora_B = self.kaiming(self.r, self.columns), self.zeros(self.rows, self.r)
        self.delora_lambda = nn.Parameter(  # type: ignore[assignment]
            torch.full_like(self.delora_A[0, :1], self.delora_lambda)
        )
        norms = torch.linalg.vector_norm(widen(weight.detach()).flatten(1), dim=0)
        self.register_buffer("delora_w_norm", norms)
        self.delora_w_norm: Tensor

    def delta(self) -> Tensor:
        A, B = widen(self.delora_A), widen(self.delora_B)
        lengths_A = torch.linalg.vector_norm(A, dim=1).clamp_min(1e-4)
        lengths_B = torch.linalg.vector_norm(B, dim=0).clamp_min(1e-4)
        scale = widen(self.delora_lambda) / (  # type: ignore[arg-type]
            self.r * lengths_A * lengths_B
        )
        delta: Tensor = (B * scale) @ A * widen(self.delora_w_norm)
        return delta


class _Turned(Frozen):
    """An adapter that turns the rows of the base, a matrix."""

    def turn(self, matrix: Tensor, backwards: bool) -> Tensor:
        """Return the matrix with its rows turned, or turned back."""
        raise NotImplementedError

    def value(self, X: Tensor) -> Tensor:
        return self.turn(X.flatten(1), False).reshape(X.shape)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the value, turned back."""
        return self.turn(widen(value).flatten(1), True).reshape(value.shape).to(value.dtype)


class OFT(_Turned, name="oft"):
    """Rotate the inputs by a block-diagonal matrix: W Rᵀ, each block of R is (I - Q)(I + Q)⁻¹ with Q skew.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.allclose(OFT(oft_block_size=2, weight=weight)(weight), weight)
    True

    Arguments:
        oft_block_size: size of a block; divides the number of inputs.
        block_share: one block for all.
    """

    guarantee = FRESH + "; the singular values are those of the base"
    cost = "O(out · in · block size), and a solve per block"
    reference = "Qiu et al. 2023, arXiv:2306.07280; peft OFTConfig(use_cayley_neumann=False)"

    oft_block_size: int = 32
    block_share: bool = False

    def start(self, weight: Tensor) -> None:
        size = self.oft_block_size
        if size < 1 or self.columns % size:
            raise RewriterError(f"oft_block_size {size} does not divide the {self.columns} inputs of the weight")
        self.oft_R = self.zeros(1 if self.block_share else self.columns // size, size * (size - 1) // 2)
        rows, cols = torch.triu_indices(size, size, 1, device=weight.device)
        self.register_buffer("upper", rows * size + cols, persistent=False)
        self.upper: Tensor

    def turn(self, matrix: Tensor, backwards: bool) -> Tensor:
        size, entries = self.oft_block_size, widen(self.oft_R)
        flat = torch.zeros(entries.shape[0], size * size, dtype=entries.dtype, device=entries.device)
        Q = flat.index_copy(1, self.upper, entries).view(-1, size, size)
        Q = Q - Q.mT
        eye = torch.eye(size, dtype=Q.dtype, device=Q.device)
        R = torch.linalg.solve(eye + Q, eye - Q)
        blocks = torch.unflatten(matrix, 1, [-1, size]).transpose(0, 1)
        turned: Tensor = blocks @ (R if backwards else R.mT)
        return turned.transpose(0, 1).flatten(1)


class HRA(_Turned, name="hra"):
    """Reflect the inputs in `r` trained hyperplanes in a row: W · Π (I - 2 u uᵀ), each u of length one.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.allclose(HRA(r=2, weight=weight)(weight), weight, atol=1e-6)
    True

    Arguments:
        r: number of reflections; a new adapter needs it even, since equal pairs cancel.
        apply_GS: make the normals orthogonal to each other first (Gram-Schmidt).
        init_weights: start from equal pairs, so that nothing changes; else all are random.
    """

    guarantee = FRESH + "; the singular values are those of the base"
    reference = "Yuan, Liu, Xu 2024, arXiv:2405.17484; peft HRAConfig"

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True

    def start(self, weight: Tensor) -> None:
        if self.init_weights and (self.r % 2 or self.apply_GS):
            raise RewriterError(
                "hra starts as the identity with an even r and without apply_GS; else set init_weights: false"
            )
        if self.apply_GS and self.r > self.columns:
            raise RewriterError(f"hra cannot make {self.r} normals orthogonal in {self.columns} dimensions")
        pairs = self.kaiming(self.columns, self.r // 2 if self.init_weights else self.r)
        self.hra_u = nn.Parameter(pairs.detach().repeat_interleave(2, dim=1)) if self.init_weights else pairs

    def turn(self, matrix: Tensor, backwards: bool) -> Tensor:
        normals = widen(self.hra_u)
        if self.apply_GS:
            Q: Tensor = torch.linalg.qr(normals)[0]
            return matrix - 2 * (matrix @ Q) @ Q.mT
        normals = normals / torch.linalg.vector_norm(normals, dim=0, keepdim=True)
        for i in range(self.r):
            u = normals[:, self.r - 1 - i if backwards else i]
            matrix = matrix - 2 * torch.outer(matrix @ u, u)
        return matrix


class RoAd(_Turned, name="road"):
    """Rotate and scale the outputs in pairs, each by an angle and a length of its own.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.equal(RoAd(group_size=2, weight=weight)(weight), weight)
    True

    PEFT turns a layer's output, so select the bias too (its rows are turned alike).

    Arguments:
        variant: ``road_1``: an angle and length per pair; ``road_2``: per output; ``road_4``: two per output.
        group_size: outputs are paired within groups of this even size: the first half with the second.
    """

    cost = "about four passes over the tensor"
    reference = "Liao and Monz 2024, arXiv:2409.00119; peft RoadConfig"
    least_dims = 0

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64

    def start(self, weight: Tensor) -> None:
        size = self.group_size
        if size < 2 or size % 2 or self.rows % size or not self.rows:
            raise RewriterError(f"road's group_size {size} is not even, or does not divide the {self.rows} outputs")
        self.width = size // 2
        each = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}[self.variant]
        self.road_theta = self.zeros(self.rows // size, *each, self.width)
        self.road_alpha = nn.Parameter(torch.ones_like(self.road_theta))

    def value(self, X: Tensor) -> Tensor:
        return self.turn(X.reshape(self.rows, -1), False).reshape(X.shape)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the value, turned back; not finite where a pair is scaled to zero."""
        return self.turn(widen(value).reshape(self.rows, -1), True).reshape(value.shape).to(value.dtype)

    def turn(self, matrix: Tensor, backwards: bool) -> Tensor:
        theta, alpha = widen(self.road_theta), widen(self.road_alpha)
        first = (alpha[:, 0] * theta[:, 0].cos()).expand([-1, 2, self.width]).unsqueeze(-1)
        second = (alpha[:, -1] * theta[:, -1].sin()).expand([-1, 2, self.width]).unsqueeze(-1)
        pairs = matrix.reshape(first.shape[0], 2, self.width, -1)
        partner = torch.stack((-pairs[:, 1], pairs[:, 0]), dim=1)
        if not backwards:
            return (pairs * first + partner * second).reshape(matrix.shape)
        determinant = first[:, 0] * first[:, 1] + second[:, 0] * second[:, 1]
        return ((pairs * first.flip(1) - partner * second) / determinant.unsqueeze(1)).reshape(matrix.shape)
