"""Matrices of bounded and of exact rank, stored as their factors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_matrix, require_real, require_shape
from rewriter.parametrizations.maths._householder import householder
from rewriter.parametrizations.maths._orthonormal import haar, reflectors
from rewriter.parametrizations.maths._precision import wide_dtype, widen
from rewriter.parametrizations.maths._softplus import inverse_softplus


class _Factored(nn.Module):
    batched = True

    def __init__(self, name: str, rank: int, weight: Tensor) -> None:
        super().__init__()
        require_matrix(name, weight)
        require_real(name, weight)
        shorter = min(weight.shape[-2:])
        if not 1 <= rank <= shorter:
            raise RewriterError(
                f"{name} of a weight of shape {list(weight.shape)} has a rank in 1..{shorter}, not {rank}"
            )
        self.name, self.rank = name, rank
        self.size, self.dtype, self.device = list(weight.shape), weight.dtype, weight.device

    def truncated(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the leading singular vectors and values of `value`: U (m x r), S (r), V (n x r)."""
        require_shape(self.name, value, tuple(self.size))
        U, S, Vh = torch.linalg.svd(widen(value), full_matrices=False)
        return U[..., : self.rank], S[..., : self.rank], Vh[..., : self.rank, :].mT

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(*self.size[:-2], *shape, dtype=wide_dtype(self.dtype), device=self.device)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


@register("low_rank")
class LowRank(_Factored):
    """Compute a matrix of rank at most r from two factors: U Vᵀ.

    >>> import torch
    >>> step = LowRank(rank=1, weight=torch.eye(3))
    >>> [factor.shape for factor in step.right_inverse(torch.ones(3, 3))]
    [torch.Size([3, 1]), torch.Size([3, 1])]
    >>> step(*step.right_inverse(torch.ones(3, 3))).allclose(torch.ones(3, 3))
    True

    The factors are what is stored, r · (m + n) numbers. The right inverse is the truncated singular value
    decomposition, whose value is the nearest matrix of that rank; both get the roots of the singular values.

    Arguments:
        rank: the largest rank of a value.
        weight: of shape ``(..., m, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is no real matrix, or the rank does not fit it.
    """

    guarantee = "rank at most r, up to rounding"
    cost = "O(m · n · r); the right inverse one SVD"
    reference = "Eckart and Young 1936; geotorch.LowRank"

    def __init__(self, rank: int, *, weight: Tensor) -> None:
        super().__init__("low_rank", rank, weight)

    def forward(self, U: Tensor, V: Tensor) -> Tensor:
        return _product(widen(U), widen(V)).to(U.dtype)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the nearest matrix of this rank."""
        U, S, V = self.truncated(value)
        root = S.sqrt().unsqueeze(-2)
        return (U * root).to(value.dtype), (V * root).to(value.dtype)

    def sample(self) -> Tensor:
        """Return a product of two Gaussian factors whose entries have variance 1 / n."""
        U, V = self.drawn(self.size[-2], self.rank), self.drawn(self.size[-1], self.rank)
        value: Tensor = U @ V.mT / (self.rank * self.size[-1]) ** 0.5
        return value.to(self.dtype)


@register("fixed_rank")
class FixedRank(_Factored):
    """Compute a matrix of rank exactly r: H(U) diag(softplus s) H(V)ᵀ, H a product of r reflections.

    >>> import torch
    >>> step = FixedRank(rank=2, weight=torch.eye(4))
    >>> value = step(*step.right_inverse(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))))
    >>> value.diagonal()
    tensor([3., 2., 0., 0.])

    Arguments:
        rank: the rank of every value.
        weight: of shape ``(..., m, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is no real matrix, or the rank does not fit it.
    """

    guarantee = "rank exactly r: r positive singular values, the others zero up to rounding"
    cost = "O((m + n) · r² + m · n · r); the right inverse one SVD"
    reference = "Vandereycken 2013, SIAM J. Optim. 23; geotorch.FixedRank"

    def __init__(self, rank: int, *, weight: Tensor) -> None:
        super().__init__("fixed_rank", rank, weight)

    def forward(self, U: Tensor, s: Tensor, V: Tensor) -> Tensor:
        scales = F.softplus(widen(s)).unsqueeze(-2)
        return _product(_orthonormal(U) * scales, _orthonormal(V)).to(U.dtype)

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
        *lead, m, n = self.size
        wide = wide_dtype(self.dtype)
        U, V = haar((*lead, m, self.rank), wide, self.device), haar((*lead, n, self.rank), wide, self.device)
        value: Tensor = U * (torch.rand_like(U[..., :1, :]) + 0.5) @ V.mT
        return value.to(self.dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    # Inside autocast the product would be rounded to half precision, and with it the rank lost.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return left @ right.mT
    else:
        if left.is_meta or not torch.is_autocast_enabled(left.device.type):
            return left @ right.mT
        with torch.autocast(left.device.type, enabled=False):
            return left @ right.mT


def _orthonormal(X: Tensor) -> Tensor:
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return householder(widen(X))
    else:
        if X.is_meta or not torch.is_autocast_enabled(X.device.type):
            return householder(widen(X))
        with torch.autocast(X.device.type, enabled=False):
            return householder(widen(X))
