"""Matrices with singular values near one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Space
from rewriter.parametrizations._orthogonal import Orthogonal
from rewriter.parametrizations._stiefel import Stiefel
from rewriter.parametrizations.maths._checks import require_shape
from rewriter.parametrizations.maths._orthonormal import haar
from rewriter.parametrizations.maths._precision import widen


class AlmostOrthogonal(Space, name="almost_orthogonal"):
    """Matrices whose singular values all lie within a radius of one.

    >>> import torch
    >>> step = AlmostOrthogonal(radius=0.1, weight=torch.empty(4, 3))
    >>> singular = torch.linalg.svdvals(step(torch.randn(4, 3)))
    >>> bool(((singular - 1).abs() <= 0.1 + 1e-5).all())
    True

    The matrix is ``U S V^T``: the strict lower triangle of the tensor moves U, its diagonal the singular values, its
    strict upper triangle V.

    Arguments:
        radius: the largest distance of a singular value from one, between 0 and 1.
        f: the bound on the singular values: ``sin`` reaches the ends of the interval, ``tanh`` does not.
        map: the exponential or the Cayley map, for U and V.
    """

    guarantee = "all singular values lie in [1 - radius, 1 + radius], up to 10 n eps, with matrix_exp times 1 + |X|"
    cost = "O(n k^2) for n rows and k <= n columns"
    reference = "Lezcano-Casado, https://arxiv.org/abs/1909.09501"
    takes = ("matrix", "real")
    batched = True

    radius: float
    f: Literal["sin", "tanh"] = "sin"
    map: Literal["matrix_exp", "cayley"] = "matrix_exp"

    def build(self, weight: Tensor) -> None:
        if not 0 < self.radius <= 1:
            raise RewriterError(f"almost_orthogonal: radius must be in (0, 1], not {self.radius}")
        *lead, m, n = weight.shape
        k = min(m, n)
        self.left = Stiefel(self.map, weight=weight.new_empty(*lead, max(m, n), k))
        self.right = Orthogonal(self.map, weight=weight.new_empty(*lead, k, k))

    def value(self, X: Tensor) -> Tensor:
        wide = X.size(-2) < X.size(-1)
        A = X.mT if wide else X
        s = A.diagonal(dim1=-2, dim2=-1)
        S = 1 + self.radius * (torch.sin(s) if self.f == "sin" else torch.tanh(s))
        U, V = self.left(A.tril(-1)), self.right(A[..., : A.size(-1), :].triu(1).mT)
        W: Tensor = (U * S.unsqueeze(-2)) @ V.mT
        return W.mT if wide else W

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor for `value`, its singular values clamped into the interval."""
        require_shape("almost_orthogonal", value, self.shape)
        wide = value.size(-2) < value.size(-1)
        U, S, Vh = torch.linalg.svd(widen(value.mT if wide else value), full_matrices=False)
        self.left.right_inverse(U)
        self.right.right_inverse(Vh.mT)
        bound = 1.0 if self.f == "sin" else 1 - 4 * torch.finfo(S.dtype).eps
        x = ((S - 1) / self.radius).clamp(-bound, bound)
        X = torch.zeros_like(U)
        X.diagonal(dim1=-2, dim2=-1).copy_(x.asin() if self.f == "sin" else x.atanh())
        return (X.mT if wide else X).to(value.dtype)

    def sample(self) -> Tensor:
        """Return an orthogonal matrix, drawn uniformly."""
        return haar(self.noise()).to(self.dtype)
