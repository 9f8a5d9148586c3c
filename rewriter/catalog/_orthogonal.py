"""Orthogonal and unitary matrices: orthonormal columns, or rows where the matrix is wide."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rewriter._registry import register
from rewriter.catalog._maps._cayley import cayley
from rewriter.catalog._maps._checks import require_matrix, require_shape
from rewriter.catalog._maps._exponential import exponential
from rewriter.catalog._maps._householder import householder
from rewriter.catalog._maps._orthonormal import haar, is_orthonormal, orthonormal, reflectors
from rewriter.catalog._maps._precision import wide_dtype, widen
from rewriter.errors import RewriterError


@register("orthogonal")
class Orthogonal(nn.Module):
    """Matrices with orthonormal columns, or orthonormal rows where they are wide.

    >>> import torch
    >>> Q = Orthogonal(weight=torch.eye(3)).sample()
    >>> torch.allclose(Q.mT @ Q, torch.eye(3), atol=1e-6)
    True

    The parametrization is the one of :func:`torch.nn.utils.parametrizations.orthogonal`: the same tensors
    give the same matrices, so state dicts are interchangeable.

    Arguments:
        map: how a lower triangle becomes orthogonal: the exponential or the Cayley map of a skew matrix, or a
            product of Householder reflections. Without it, ``matrix_exp`` where the weight is square or
            complex, else ``householder``.
        trivialization: map onto the neighbourhood of a base point, kept in the buffer ``base``, of shape
            ``(..., n, n)`` with n the longer side. Any orthogonal matrix can be assigned then.
        weight: of shape ``(..., m, n)``, filled in by the site.

    Raises:
        RewriterError: the weight is no matrix, or complex with ``map: householder``.
    """

    guarantee = "|Q^T Q - I| <= 10 n eps (Q Q^T where Q is wide)"
    cost = "O(n^3) with a base or matrix_exp, else O(n k^2), for n rows and k <= n columns"
    reference = "Lezcano-Casado, https://arxiv.org/abs/1909.09501"
    batched = True

    def __init__(
        self,
        map: Literal["matrix_exp", "cayley", "householder"] | None = None,
        trivialization: bool = True,
        *,
        weight: Tensor,
    ) -> None:
        super().__init__()
        require_matrix("orthogonal", weight)
        if map is None:
            square = weight.size(-2) == weight.size(-1)
            map = "matrix_exp" if square or weight.is_complex() else "householder"
        if map not in ("matrix_exp", "cayley", "householder"):
            raise RewriterError(f"orthogonal: map must be matrix_exp, cayley or householder, not {map!r}")
        if map == "householder" and weight.is_complex():
            raise RewriterError("orthogonal: householder is for real matrices; use matrix_exp or cayley")
        self.map: str = map
        self.trivialization = trivialization
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        self.base: Tensor | None
        if trivialization:
            n = max(weight.shape[-2:])
            base = torch.eye(n, dtype=wide_dtype(weight.dtype), device=weight.device)
            self.register_buffer("base", base.expand(*weight.shape[:-2], n, n).clone())
        else:
            self.base = None

    def forward(self, X: Tensor) -> Tensor:
        wide = X.size(-2) < X.size(-1)
        A = widen(X.mT if wide else X)
        if self.map == "matrix_exp":
            Q = exponential(A)
        elif self.map == "cayley":
            Q = cayley(A)
        else:
            Q = householder(A)
        base = self.base
        if base is not None:
            Q = base @ Q
        return (Q.mT if wide else Q).to(X.dtype)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor that stands for `value`, or for its Q factor where it is not orthogonal.

        Raises:
            RewriterError: without a base, `value` is not in the image of the map.
        """
        require_shape("orthogonal", value, self.shape)
        wide = value.size(-2) < value.size(-1)
        W = widen(value.mT if wide else value)
        if self.base is not None:
            self.base.copy_(_completed(W))
            X = torch.zeros_like(W)
            X.diagonal(dim1=-2, dim2=-1).fill_(-1)
        elif self.map == "householder":
            X = reflectors(W)
        else:
            raise NotImplementedError("matrix_exp and cayley without trivialization")
        return (X.mT if wide else X).to(value.dtype)

    @torch.no_grad()
    def update_base(self, X: Tensor) -> Tensor:
        """Move the base to the matrix that X stands for and return the tensor that stands for it now."""
        return self.right_inverse(self.forward(X))

    def sample(self) -> Tensor:
        """Return a matrix drawn from the uniform (Haar) distribution."""
        return haar(self.shape, self.dtype, self.device)

    def extra_repr(self) -> str:
        return f"map={self.map}, trivialization={self.trivialization}"


def _completed(W: Tensor) -> Tensor:
    """Return an orthogonal ``(..., n, n)`` matrix that starts with the columns of W made orthonormal."""
    n, k = W.size(-2), W.size(-1)
    if n == k:
        return W if is_orthonormal(W) else orthonormal(W)
    noise = torch.randn(*W.shape[:-2], n, n - k, dtype=W.dtype, device=W.device)
    return orthonormal(torch.cat([W, noise], -1))
