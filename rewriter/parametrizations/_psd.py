"""Positive semidefinite, positive definite and correlation matrices."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Space
from rewriter.parametrizations.maths._checks import require_values
from rewriter.parametrizations.maths._cholesky import cholesky, gram, positive_triangle, positive_triangle_inverse
from rewriter.parametrizations.maths._precision import widen


class _Definite(Space):
    takes: ClassVar[tuple[str, ...]] = ("square",)
    batched = True


class PositiveSemidefinite(_Definite, name="psd"):
    """Positive semidefinite matrices of at most, or of exactly, a given rank: a factor times its transpose.

    >>> import torch
    >>> PositiveSemidefinite(rank=1, weight=torch.empty(2, 2))(torch.tensor([[1.0, 7.0], [2.0, 7.0]]))
    tensor([[1., 2.],
            [2., 4.]])

    Arguments:
        rank: the largest rank; the first `rank` columns of the tensor are the factor. Without it, full rank.
        fixed: make the factor a lower triangle with a positive diagonal, so that the rank is not less either.
    """

    guarantee = "W is Hermitian, its eigenvalues are >= -n eps |W|, its rank is at most `rank`"
    cost = "n^2 r for rank r"
    reference = "Burer and Monteiro, Math. Program. 95 (2003)"

    rank: int | None = None
    fixed: bool = False

    def build(self, weight: Tensor) -> None:
        n = weight.size(-1)
        self.columns: int = n if self.rank is None else self.rank
        if not 1 <= self.columns <= n:
            raise RewriterError(f"psd: rank must be in 1..{n}, not {self.rank}")

    def value(self, X: Tensor) -> Tensor:
        F = X[..., : self.columns]
        return gram(positive_triangle(F) if self.fixed else F)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the factor of the positive semidefinite matrix of that rank nearest to `value`."""
        W = widen(value)
        values, Q = torch.linalg.eigh((W + W.mH) / 2)
        F = (Q * values.clamp_min(0).sqrt().unsqueeze(-2))[..., -self.columns :]
        if self.fixed:
            F = positive_triangle_inverse(_triangular_factor(F))
        X = torch.zeros_like(W)
        X[..., : self.columns] = F
        return X.to(value.dtype)


def _triangular_factor(F: Tensor) -> Tensor:
    """Return the lower triangle L, with a positive diagonal, for which ``L L^H = F F^H``."""
    R = torch.linalg.qr(F.mH)[1]
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    phase = torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal.sgn())
    L: Tensor = (phase.conj().unsqueeze(-1) * R).mH
    real = L.diagonal(dim1=-2, dim2=-1).abs().clamp_min(torch.finfo(L.dtype).eps)
    square = L[..., : L.size(-1), :]
    square.diagonal(dim1=-2, dim2=-1).copy_(real)
    return L


class PositiveDefinite(_Definite, name="spd"):
    """Positive definite matrices, by their Cholesky factor.

    >>> import torch
    >>> step = PositiveDefinite(weight=torch.eye(2))
    >>> step(step.right_inverse(torch.tensor([[4.0, 2.0], [2.0, 3.0]])))
    tensor([[4., 2.],
            [2., 3.]])

    The strict lower triangle of the tensor is that of the factor; its diagonal goes through the softplus.

    Arguments:
        eps: a least eigenvalue, added to all of them.
    """

    guarantee = "W is Hermitian and its eigenvalues are at least eps, up to n eps(dtype) |W|"
    cost = "2 n^3"
    reference = "Pinheiro and Bates, Stat. Comput. 6 (1996)"

    eps: float = 0.0

    def build(self, weight: Tensor) -> None:
        if self.eps < 0:
            raise RewriterError(f"spd: eps must not be negative, it is {self.eps}")

    def value(self, X: Tensor) -> Tensor:
        W = gram(positive_triangle(X))
        if self.eps != 0.0:
            W = W + self.eps * torch.eye(X.size(-1), dtype=X.dtype, device=X.device)
        return W

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor for `value`, or for a positive definite matrix near it."""
        require_values("spd", value)
        W = widen(value)
        shifted = W - self.eps * torch.eye(W.size(-1), dtype=W.dtype, device=W.device)
        return positive_triangle_inverse(cholesky(shifted)).to(value.dtype)


class Correlation(_Definite, name="correlation"):
    """Correlation matrices: positive definite with a diagonal of ones.

    >>> import torch
    >>> step = Correlation(weight=torch.eye(2))
    >>> step(step.right_inverse(torch.tensor([[1.0, 0.6], [0.6, 1.0]])))
    tensor([[1.0000, 0.6000],
            [0.6000, 1.0000]])
    """

    guarantee = "W is symmetric and positive definite, its diagonal is one up to 4 eps"
    cost = "2 n^3"
    reference = "Pinheiro and Bates, Stat. Comput. 6 (1996)"
    takes = ("square", "real")

    def value(self, X: Tensor) -> Tensor:
        L = positive_triangle(X)
        rows: Tensor = L / torch.linalg.vector_norm(L, dim=-1, keepdim=True)
        return gram(rows)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor for `value`, or for the correlations of a matrix near it."""
        require_values("correlation", value)
        return positive_triangle_inverse(cholesky(widen(value))).to(value.dtype)
