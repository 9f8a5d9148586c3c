"""Tall matrices with orthonormal columns, and the subspaces they span, at a cost linear in the longer side."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._orthogonal import _Orthogonal
from rewriter.parametrizations.maths._householder import reflected
from rewriter.parametrizations.maths._orthonormal import orthonormal, reflectors
from rewriter.parametrizations.maths._precision import wide_dtype, widen


class Stiefel(_Orthogonal, name="stiefel"):
    """Orthonormal columns (rows where the matrix is wide), without any square matrix of the longer side.

    >>> import torch
    >>> step = Stiefel(weight=torch.empty(1000, 3))
    >>> Q = step.sample()
    >>> torch.allclose(step(step.right_inverse(Q)), Q, atol=1e-5)
    True

    The values are those of ``orthogonal`` with a base point. The base is stored as reflections, in a buffer ``base``
    of the weight's own shape, so that 8000 x 50 costs milliseconds and 1.6 MB instead of 256 MB.

    Arguments:
        map: as of ``orthogonal``.
    """

    cost = "O(n k^2) for n rows and k <= n columns"
    reference = "Edelman, Arias and Smith, https://arxiv.org/abs/physics/9806030"
    takes = ("matrix", "real")

    def _first_base(self) -> Tensor:
        *lead, m, n = self.shape or ()
        eye = torch.eye(max(m, n), min(m, n), dtype=wide_dtype(self.dtype), device=self.device)
        return -eye.repeat(*lead, 1, 1)

    def _rebased(self, Q: Tensor) -> Tensor:
        base = self.base
        assert base is not None
        return reflected(widen(base), Q)

    def _move_base(self, W: Tensor) -> None:
        assert self.base is not None
        self.base.copy_(reflectors(orthonormal(W)))


class Grassmann(Stiefel, name="grassmann"):
    """Orthonormal columns that move only when the subspace they span moves.

    >>> import torch
    >>> step = Grassmann(weight=torch.empty(5, 2))
    >>> Q = step.sample()
    >>> torch.allclose(step(step.right_inverse(Q)), Q, atol=1e-5)
    True

    Columns do not rotate among themselves: forward does not read the square block on top of the tensor. The
    weight is not square.

    Arguments:
        map: the exponential (along geodesics) or the Cayley map.
    """

    cost = "O(n k^2) for n rows and k < n columns"

    map: Literal["matrix_exp", "cayley"] = "matrix_exp"

    def build(self, weight: Tensor) -> None:
        super().build(weight)
        if weight.size(-1) == weight.size(-2):
            raise RewriterError(f"grassmann: n vectors span all of the space, found shape {list(weight.shape)}")

    def _tangent(self, A: Tensor) -> Tensor:
        k = A.size(-1)
        return torch.cat([torch.zeros_like(A[..., :k, :]), A[..., k:, :]], dim=-2)
