"""Positive semidefinite, positive definite and correlation matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_real, require_square, require_values
from rewriter.parametrizations.maths._cholesky import cholesky, gram, positive_triangle, positive_triangle_inverse
from rewriter.parametrizations.maths._precision import Precise, wide_dtype, widen


class _Definite(Precise):
    batched = True
    name = ""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        require_square(self.name, weight)
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device

    def sample(self) -> Tensor:
        """Return a random matrix: that of a standard normal tensor."""
        noise = torch.randn(self.shape, dtype=wide_dtype(self.dtype), device=self.device)
        return self.value(noise).to(self.dtype)


@register("psd")
class PositiveSemidefinite(_Definite):
    """Positive semidefinite matrices of at most, or of exactly, a given rank: a factor times its transpose.

    >>> import torch
    >>> PositiveSemidefinite(rank=1, weight=torch.empty(2, 2))(torch.tensor([[1.0, 7.0], [2.0, 7.0]]))
    tensor([[1., 2.],
            [2., 4.]])

    Arguments:
        rank: the largest rank; the first `rank` columns of the tensor are the factor. Without it, full rank.
        fixed: make the factor a lower triangle with a positive diagonal, so that the rank is not less either.
        weight: of shape ``(..., n, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is not square or `rank` is out of range.
    """

    guarantee = "W is Hermitian, its eigenvalues are >= -n eps |W|, its rank is at most `rank`"
    cost = "n^2 r for rank r"
    reference = "Burer and Monteiro, Math. Program. 95 (2003)"
    name = "psd"

    def __init__(self, rank: int | None = None, fixed: bool = False, *, weight: Tensor) -> None:
        super().__init__(weight)
        n = weight.size(-1)
        if rank is not None and not 1 <= rank <= n:
            raise RewriterError(f"psd: rank must be in 1..{n}, not {rank}")
        self.rank: int = n if rank is None else rank
        self.fixed = fixed

    def value(self, X: Tensor) -> Tensor:
        F = X[..., : self.rank]
        return gram(positive_triangle(F) if self.fixed else F)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the factor of the positive semidefinite matrix of that rank nearest to `value`."""
        W = widen(value)
        values, Q = torch.linalg.eigh((W + W.mH) / 2)
        F = (Q * values.clamp_min(0).sqrt().unsqueeze(-2))[..., -self.rank :]
        if self.fixed:
            F = positive_triangle_inverse(_triangular_factor(F))
        X = torch.zeros_like(W)
        X[..., : self.rank] = F
        return X.to(value.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, fixed={self.fixed}"


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


@register("spd")
class PositiveDefinite(_Definite):
    """Positive definite matrices, by their Cholesky factor.

    >>> import torch
    >>> step = PositiveDefinite(weight=torch.eye(2))
    >>> step(step.right_inverse(torch.tensor([[4.0, 2.0], [2.0, 3.0]])))
    tensor([[4., 2.],
            [2., 3.]])

    The strict lower triangle of the tensor is that of the factor; its diagonal goes through the softplus.

    Arguments:
        eps: a least eigenvalue, added to all of them.
        weight: of shape ``(..., n, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is not square or `eps` is negative.
    """

    guarantee = "W is Hermitian and its eigenvalues are at least eps, up to n eps(dtype) |W|"
    cost = "2 n^3"
    reference = "Pinheiro and Bates, Stat. Comput. 6 (1996)"
    name = "spd"

    def __init__(self, eps: float = 0.0, *, weight: Tensor) -> None:
        super().__init__(weight)
        if eps < 0:
            raise RewriterError(f"spd: eps must not be negative, it is {eps}")
        self.eps = float(eps)

    def value(self, X: Tensor) -> Tensor:
        W = gram(positive_triangle(X))
        if self.eps != 0.0:
            W = W + self.eps * torch.eye(X.size(-1), dtype=X.dtype, device=X.device)
        return W

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor that stands for `value`, or for a positive definite matrix near it."""
        require_values("spd", value)
        W = widen(value)
        shifted = W - self.eps * torch.eye(W.size(-1), dtype=W.dtype, device=W.device)
        return positive_triangle_inverse(cholesky(shifted)).to(value.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


@register("correlation")
class Correlation(_Definite):
    """Correlation matrices: positive definite with a diagonal of ones.

    >>> import torch
    >>> step = Correlation(weight=torch.eye(2))
    >>> step(step.right_inverse(torch.tensor([[1.0, 0.6], [0.6, 1.0]])))
    tensor([[1.0000, 0.6000],
            [0.6000, 1.0000]])

    Arguments:
        weight: real, of shape ``(..., n, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is not a square real matrix.
    """

    guarantee = "W is symmetric and positive definite, its diagonal is one up to 4 eps"
    cost = "2 n^3"
    reference = "Pinheiro and Bates, Stat. Comput. 6 (1996)"
    name = "correlation"

    def __init__(self, *, weight: Tensor) -> None:
        super().__init__(weight)
        require_real("correlation", weight)

    def value(self, X: Tensor) -> Tensor:
        L = positive_triangle(X)
        rows: Tensor = L / torch.linalg.vector_norm(L, dim=-1, keepdim=True)
        return gram(rows)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor that stands for `value`, or for the correlations of a matrix near it."""
        require_values("correlation", value)
        return positive_triangle_inverse(cholesky(widen(value))).to(value.dtype)
