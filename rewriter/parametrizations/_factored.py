"""Matrices of bounded and of exact rank and sums of Kronecker products, stored as their factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Parametrization
from rewriter.parametrizations.maths._checks import require_shape
from rewriter.parametrizations.maths._cholesky import inverse_softplus
from rewriter.parametrizations.maths._householder import householder
from rewriter.parametrizations.maths._orthonormal import haar, reflectors
from rewriter.parametrizations.maths._precision import widen


class _Truncated(Parametrization):
    takes = ("matrix", "real")
    batched = True

    rank: int

    def build(self, weight: Tensor) -> None:
        shorter = min(weight.shape[-2:])
        if not 1 <= self.rank <= shorter:
            raise RewriterError(
                f"{self.name} of a weight of shape {list(weight.shape)} has a rank in 1..{shorter}, not {self.rank}"
            )

    def truncated(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the leading singular vectors and values of `value`: U (m x r), S (r), V (n x r)."""
        require_shape(self.name, value, self.shape)
        U, S, Vh = torch.linalg.svd(widen(value), full_matrices=False)
        return U[..., : self.rank], S[..., : self.rank], Vh[..., : self.rank, :].mT

    def drawn(self) -> tuple[Tensor, Tensor]:
        """Return standard normal factors, m x r and n x r."""
        *lead, m, n = self.shape or ()
        return self.noise(*lead, m, self.rank), self.noise(*lead, n, self.rank)


class LowRank(_Truncated, name="low_rank"):
    """Compute a matrix of rank at most r from two factors: U Vᵀ.

    >>> import torch
    >>> step = LowRank(rank=1, weight=torch.eye(3))
    >>> [factor.shape for factor in step.right_inverse(torch.ones(3, 3))]
    [torch.Size([3, 1]), torch.Size([3, 1])]
    >>> step(*step.right_inverse(torch.ones(3, 3))).allclose(torch.ones(3, 3))
    True

    The originals are the factors, r · (m + n) numbers. The right inverse is the truncated singular value
    decomposition, whose value is the nearest matrix of that rank; both get the roots of the singular values.

    Arguments:
        rank: the largest rank of a value.
    """

    guarantee = "rank at most r, up to rounding"
    cost = "O(m · n · r); the right inverse one SVD"
    reference = "Eckart and Young 1936; geotorch.LowRank"

    def forward(self, U: Tensor, V: Tensor) -> Tensor:
        return _product(U, None, V)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the nearest matrix of this rank."""
        U, S, V = self.truncated(value)
        root = S.sqrt().unsqueeze(-2)
        return (U * root).to(value.dtype), (V * root).to(value.dtype)

    def sample(self) -> Tensor:
        """Return a product of two Gaussian factors whose entries have variance 1 / n."""
        U, V = self.drawn()
        value: Tensor = U @ V.mT / (self.rank * V.size(-2)) ** 0.5
        return value.to(self.dtype)


class FixedRank(_Truncated, name="fixed_rank"):
    """Compute a matrix of rank exactly r: H(U) diag(softplus s) H(V)ᵀ, H a product of r reflections.

    >>> import torch
    >>> step = FixedRank(rank=2, weight=torch.eye(4))
    >>> value = step(*step.right_inverse(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))))
    >>> value.diagonal()
    tensor([3., 2., 0., 0.])

    Arguments:
        rank: the rank of every value.
    """

    guarantee = "rank exactly r: r positive singular values, the others zero up to rounding"
    cost = "O((m + n) · r² + m · n · r); the right inverse one SVD"
    reference = "Vandereycken 2013, SIAM J. Optim. 23; geotorch.FixedRank"

    def forward(self, U: Tensor, s: Tensor, V: Tensor) -> Tensor:
        return _product(U, s, V)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the factors of the nearest matrix; singular values that vanish are made tiny."""
        U, S, V = self.truncated(value)
        least = torch.finfo(S.dtype).eps * S.amax(-1, keepdim=True).clamp_min(torch.finfo(S.dtype).eps)
        S = torch.maximum(S, least)
        dtype = value.dtype
        # torch has no geqrf for meta tensors, of which only the shapes matter.
        left, right = (U, V) if value.is_meta else (reflectors(U), reflectors(V))
        return left.to(dtype), inverse_softplus(S).to(dtype), right.to(dtype)

    def sample(self) -> Tensor:
        """Return a random matrix of this rank with singular values in [0.5, 1.5]."""
        U, V = map(haar, self.drawn())
        value: Tensor = U * (torch.rand_like(U[..., :1, :]) + 0.5) @ V.mT
        return value.to(self.dtype)


def _product(U: Tensor, s: Tensor | None, V: Tensor) -> Tensor:
    # Inside autocast the product would be rounded to half precision, and so lose its rank.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _wide_product(U, s, V)
    else:
        if U.is_meta or not torch.is_autocast_enabled(U.device.type):
            return _wide_product(U, s, V)
        with torch.autocast(U.device.type, enabled=False):
            return _wide_product(U, s, V)


def _wide_product(U: Tensor, s: Tensor | None, V: Tensor) -> Tensor:
    left, right = widen(U), widen(V)
    if s is not None:
        left, right = householder(left) * F.softplus(widen(s)).unsqueeze(-2), householder(right)
    return (left @ right.mT).to(U.dtype)


class Kronecker(Parametrization, name="kronecker"):
    """Compute a matrix as a Kronecker product, or a sum of several: Σ Aₖ ⊗ Bₖ.

    >>> import torch
    >>> step = Kronecker(factor_shape=[2, 1], weight=torch.zeros(4, 3))
    >>> [factor.shape for factor in step.right_inverse(torch.ones(4, 3))]
    [torch.Size([1, 2, 1]), torch.Size([1, 2, 3])]

    The originals are the factors. The right inverse finds the nearest sum of products: a truncated SVD of
    the matrix whose rows are the blocks of the value.

    Arguments:
        factor_shape: shape of the first factor; it divides that of the matrix.
        rank: number of products that are added.
    """

    guarantee = "the value is a sum of `rank` Kronecker products"
    cost = "O(rank · m · n); the right inverse one SVD"
    reference = "Van Loan and Pitsianis 1993, Approximation with Kronecker Products"
    takes = ("matrix", "real")
    batched = True

    factor_shape: Sequence[int]
    rank: int = 1

    def build(self, weight: Tensor) -> None:
        m, n = weight.shape[-2:]
        shape = list(self.factor_shape)
        if len(shape) != 2 or min(shape) < 1 or m % shape[0] or n % shape[1]:
            raise RewriterError(f"factor_shape {shape} is no [rows, columns] that divides {m} x {n}")
        self.rows, self.columns = shape
        largest = min(self.rows * self.columns, m * n // (self.rows * self.columns))
        if not 1 <= self.rank <= largest:
            raise RewriterError(
                f"kronecker with factors of {self.rows} x {self.columns}: rank in 1..{largest}, not {self.rank}"
            )

    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        left = widen(A).unsqueeze(-2).unsqueeze(-1)
        right = widen(B).unsqueeze(-2).unsqueeze(-4)
        blocks = (left * right).sum(-5)
        return blocks.flatten(-2).flatten(-3, -2).to(A.dtype)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the nearest sum of products, either with the root of the singular values."""
        require_shape("kronecker", value, self.shape)
        inner = (value.size(-2) // self.rows, value.size(-1) // self.columns)
        blocks = torch.unflatten(widen(value), -1, (self.columns, inner[1]))
        blocks = torch.unflatten(blocks, -3, (self.rows, inner[0])).transpose(-3, -2)
        U, S, Vh = torch.linalg.svd(blocks.flatten(-2).flatten(-3, -2), full_matrices=False)
        root = S[..., : self.rank, None].sqrt()
        A = torch.unflatten(U[..., : self.rank].mT * root, -1, (self.rows, self.columns))
        B = torch.unflatten(Vh[..., : self.rank, :] * root, -1, inner)
        return A.to(value.dtype), B.to(value.dtype)

    def sample(self) -> Tensor:
        """Return a sum of products of Gaussian factors whose entries have variance 1 / n."""
        *lead, m, n = self.shape or ()
        A = self.noise(*lead, self.rank, self.rows, self.columns)
        B = self.noise(*lead, self.rank, m // self.rows, n // self.columns)
        value: Tensor = self.forward(A, B) / (self.rank * n) ** 0.5
        return value.to(self.dtype)
