"""Adapters that rotate the inputs, or the outputs, of a base that is not trained."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._adapter import FRESH, kaiming, matrix_shape, require_rank, zeros
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._precision import Precise, widen


class _Rotation(Precise):
    guarantee = FRESH + "; it keeps the singular values of the base"
    freezes_original = True

    def rotate(self, matrix: Tensor, backwards: bool) -> Tensor:
        """Return the matrix with its rows rotated."""
        raise NotImplementedError

    def value(self, X: Tensor) -> Tensor:
        return self.rotate(X.flatten(1), False).reshape(X.shape)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the value, rotated back."""
        return self.rotate(widen(value).flatten(1), True).reshape(value.shape).to(value.dtype)


@register("oft")
class OFT(_Rotation):
    """Rotate the inputs by a block-diagonal matrix: W Rᵀ, each block of R is (I - Q)(I + Q)⁻¹ with Q skew.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.allclose(OFT(oft_block_size=2, weight=weight)(weight), weight)
    True

    Arguments:
        oft_block_size: size of a block; divides the number of inputs.
        block_share: one block for all.
        weight: of shape ``(out, in, ...)``, seen as ``out x (in · ...)``; filled in by the site.

    Raises:
        RewriterError: the blocks do not divide the inputs, or the weight is a vector.
    """

    cost = "O(out · in · block size), and a solve per block"
    reference = "Qiu et al. 2023, arXiv:2306.07280; peft OFTConfig(use_cayley_neumann=False)"

    def __init__(self, oft_block_size: int = 32, block_share: bool = False, *, weight: Tensor) -> None:
        super().__init__()
        columns = matrix_shape("oft", weight)[1]
        if oft_block_size < 1 or columns % oft_block_size:
            raise RewriterError(f"oft_block_size {oft_block_size} does not divide the {columns} inputs of the weight")
        self.block = oft_block_size
        count = 1 if block_share else columns // oft_block_size
        self.oft_R = zeros(weight, (count, oft_block_size * (oft_block_size - 1) // 2))
        rows, cols = torch.triu_indices(oft_block_size, oft_block_size, 1, device=weight.device)
        self.register_buffer("upper", rows * oft_block_size + cols, persistent=False)
        self.upper: Tensor

    def rotate(self, matrix: Tensor, backwards: bool) -> Tensor:
        entries = widen(self.oft_R)
        flat = torch.zeros(entries.shape[0], self.block * self.block, dtype=entries.dtype, device=entries.device)
        Q = flat.index_copy(1, self.upper, entries).view(-1, self.block, self.block)
        Q = Q - Q.mT
        eye = torch.eye(self.block, dtype=Q.dtype, device=Q.device)
        R = torch.linalg.solve(eye + Q, eye - Q)
        blocks = torch.unflatten(matrix, 1, [-1, self.block]).transpose(0, 1)
        turned: Tensor = blocks @ (R if backwards else R.mT)
        return turned.transpose(0, 1).flatten(1)


@register("hra")
class HRA(_Rotation):
    """Reflect the inputs in `r` trained hyperplanes in a row: W · Π (I - 2 u uᵀ), each u of length one.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.allclose(HRA(r=2, weight=weight)(weight), weight, atol=1e-6)
    True

    Arguments:
        r: number of reflections; a fresh adapter needs it even, since equal pairs cancel.
        apply_GS: make the normals orthogonal to each other first (Gram-Schmidt).
        init_weights: start from equal pairs, so that nothing changes; else all are random.
        weight: of shape ``(out, in, ...)``, seen as ``out x (in · ...)``; filled in by the site.

    Raises:
        RewriterError: `r` does not fit, or the weight is a vector.
    """

    cost = "O(r · entries)"
    reference = "Yuan, Liu, Xu 2024, arXiv:2405.17484; peft HRAConfig"

    def __init__(self, r: int = 8, apply_GS: bool = False, init_weights: bool = True, *, weight: Tensor) -> None:
        super().__init__()
        require_rank("hra", r)
        columns = matrix_shape("hra", weight)[1]
        if init_weights and (r % 2 or apply_GS):
            raise RewriterError(
                "hra starts as the identity with an even r and without apply_GS; else set init_weights: false"
            )
        if apply_GS and r > columns:
            raise RewriterError(f"hra cannot make {r} normals orthogonal in {columns} dimensions")
        self.r, self.apply_GS = r, apply_GS
        if init_weights:
            start = kaiming(weight, (columns, r // 2)).detach().repeat_interleave(2, dim=1)
            self.hra_u = nn.Parameter(start)
        else:
            self.hra_u = kaiming(weight, (columns, r))

    def rotate(self, matrix: Tensor, backwards: bool) -> Tensor:
        normals = widen(self.hra_u)
        if self.apply_GS:
            Q: Tensor = torch.linalg.qr(normals)[0]
            return matrix - 2 * (matrix @ Q) @ Q.mT
        normals = normals / torch.linalg.vector_norm(normals, dim=0, keepdim=True)
        for i in range(self.r):
            u = normals[:, self.r - 1 - i if backwards else i]
            matrix = matrix - 2 * torch.outer(matrix @ u, u)
        return matrix


@register("road")
class RoAd(Precise):
    """Rotate and scale the outputs in pairs, each by an angle and a length of its own.

    >>> import torch
    >>> weight = torch.randn(6, 4)
    >>> torch.equal(RoAd(group_size=2, weight=weight)(weight), weight)
    True

    PEFT turns a layer's output, so select the bias too (its rows are turned alike).

    Arguments:
        variant: ``road_1``: an angle and length per pair; ``road_2``: per output; ``road_4``: two per output.
        group_size: outputs are paired within groups of this even size: the first half with the second.
        weight: of shape ``(out, ...)``, filled in by the site.

    Raises:
        RewriterError: the group size is odd or does not divide the outputs.
    """

    guarantee = FRESH
    cost = "about four passes over the tensor"
    reference = "Liao and Monz 2024, arXiv:2409.00119; peft RoadConfig"
    freezes_original = True

    def __init__(
        self,
        variant: Literal["road_1", "road_2", "road_4"] = "road_1",
        group_size: int = 64,
        *,
        weight: Tensor,
    ) -> None:
        super().__init__()
        rows = weight.shape[0] if weight.dim() else 0
        if group_size < 2 or group_size % 2 or rows % group_size or not rows:
            raise RewriterError(f"road's group_size {group_size} is not even, or does not divide the {rows} outputs")
        self.width = group_size // 2
        each = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}[variant]
        self.road_theta = zeros(weight, (rows // group_size, *each, self.width))
        self.road_alpha = nn.Parameter(torch.ones_like(self.road_theta))

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return factors of an output itself and of its partner, as ``(groups, 2, half, 1)``."""
        theta, alpha = widen(self.road_theta), widen(self.road_alpha)
        first, second = alpha[:, 0] * theta[:, 0].cos(), alpha[:, -1] * theta[:, -1].sin()
        shape = [-1, 2, self.width]
        return first.expand(shape).unsqueeze(-1), second.expand(shape).unsqueeze(-1)

    def value(self, X: Tensor) -> Tensor:
        first, second = self.columns()
        pairs = X.reshape(first.shape[0], 2, self.width, -1)
        partner = torch.stack((-pairs[:, 1], pairs[:, 0]), dim=1)
        return (pairs * first + partner * second).reshape(X.shape)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the value, turned back; not finite where a pair is scaled to zero."""
        first, second = self.columns()
        pairs = widen(value).reshape(first.shape[0], 2, self.width, -1)
        partner = torch.stack((pairs[:, 1], -pairs[:, 0]), dim=1)
        determinant = first[:, 0] * first[:, 1] + second[:, 0] * second[:, 1]
        turned = pairs * first.flip(1) + partner * second
        return (turned / determinant.unsqueeze(1)).reshape(value.shape).to(value.dtype)
