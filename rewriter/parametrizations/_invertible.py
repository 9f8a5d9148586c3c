"""Invertible matrices of positive determinant, and of determinant one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Space
from rewriter.parametrizations._orthogonal import SpecialOrthogonal
from rewriter.parametrizations.maths._checks import require_shape, require_values
from rewriter.parametrizations.maths._cholesky import positive_triangle, positive_triangle_inverse
from rewriter.parametrizations.maths._precision import widen


class PositiveDeterminant(Space, name="gl_plus"):
    """Invertible matrices of positive determinant: a rotation times a lower triangle with a positive diagonal.

    >>> import torch
    >>> step = PositiveDeterminant(weight=torch.eye(2))
    >>> bool(torch.linalg.det(step(torch.randn(2, 2))) > 0)
    True

    The strict upper triangle of the tensor moves the rotation, the rest is the triangle.

    Arguments:
        map: the exponential or the Cayley map, for the rotation.
    """

    guarantee = "the determinant is positive, where the condition number is below 1/eps"
    cost = "O(n^3)"
    takes = ("square", "real")
    batched = True

    map: Literal["matrix_exp", "cayley"] = "matrix_exp"

    def build(self, weight: Tensor) -> None:
        self.rotation = SpecialOrthogonal(self.map, weight=weight)

    def value(self, X: Tensor) -> Tensor:
        Q: Tensor = self.rotation(X.triu(1).mT)
        return Q @ self._unit(positive_triangle(X))

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor for `value`.

        Raises:
            RewriterError: the determinant of `value` is not positive.
        """
        require_shape(self.name, value, self.shape)
        require_values(self.name, value)
        W = widen(value)
        # The QR decomposition of the matrix with its columns reversed is one into Q and a lower triangle.
        Q, R = torch.linalg.qr(W.flip(-1))
        Q, L = Q.flip(-1), R.flip(-1).flip(-2)
        diagonal = L.diagonal(dim1=-2, dim2=-1)
        sign = torch.where(diagonal < 0, -1.0, 1.0).to(W.dtype)
        Q, L = Q * sign.unsqueeze(-2), L * sign.unsqueeze(-1)
        if (diagonal == 0).any() or (torch.linalg.det(Q) < 0).any():
            raise RewriterError(
                f"{self.name}: the determinant must be positive; negate one row of the weight, or use `init: sample`"
            )
        self.rotation.right_inverse(Q)
        return positive_triangle_inverse(self._unit(L)).to(value.dtype)

    def sample(self) -> Tensor:
        """Return the matrix of a standard normal triangle and a rotation drawn uniformly."""
        triangle = self._unit(positive_triangle(self.noise()))
        return (widen(self.rotation.sample()) @ triangle).to(self.dtype)

    def _unit(self, L: Tensor) -> Tensor:
        return L


class UnitDeterminant(PositiveDeterminant, name="sl"):
    """Matrices of determinant one: a rotation times a lower triangle whose diagonal multiplies to one.

    >>> import torch
    >>> step = UnitDeterminant(weight=torch.eye(2))
    >>> torch.linalg.det(step(torch.randn(2, 2))).allclose(torch.tensor(1.0), atol=1e-5)
    True

    The right inverse scales a value of positive determinant.

    Arguments:
        map: the exponential or the Cayley map, for the rotation.
    """

    guarantee = "the determinant is one, up to n^2 eps times the condition number"

    def _unit(self, L: Tensor) -> Tensor:
        log = L.diagonal(dim1=-2, dim2=-1).log().mean(dim=-1)
        return L * torch.exp(-log).unsqueeze(-1).unsqueeze(-1)
