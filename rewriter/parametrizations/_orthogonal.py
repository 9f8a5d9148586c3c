"""Orthogonal and unitary matrices, and rotations."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Space
from rewriter.parametrizations.maths._cayley import cayley, cayley_inverse
from rewriter.parametrizations.maths._checks import require_shape, require_values
from rewriter.parametrizations.maths._exponential import exponential
from rewriter.parametrizations.maths._householder import householder, reflected
from rewriter.parametrizations.maths._logarithm import logarithm
from rewriter.parametrizations.maths._orthonormal import completed, haar, orthonormal, reflectors, rotation
from rewriter.parametrizations.maths._precision import wide_dtype, widen

_VERY_TALL = 2048
"""From so many rows on, a base is stored as reflections where there are eight times as many rows as columns."""


class _Orthogonal(Space):
    guarantee = "|Q^T Q - I| <= 10 n eps (Q Q^T where Q is wide), with matrix_exp times 1 + |X|"
    reference = "Lezcano-Casado, https://arxiv.org/abs/1909.09501"
    takes: ClassVar[tuple[str, ...]] = ("matrix",)
    batched = True

    map: Literal["matrix_exp", "cayley", "householder"] | None = None

    def build(self, weight: Tensor) -> None:
        if self.map is None:
            square = weight.size(-2) == weight.size(-1)
            self.map = "matrix_exp" if square or weight.is_complex() else "householder"
        if self.map == "householder" and weight.is_complex():
            raise RewriterError(f"{self.name}: householder is for real matrices; use matrix_exp or cayley")
        self.trivialization: bool = getattr(self, "trivialization", True)  # Stiefel has no such argument
        self.base: Tensor | None
        if self.trivialization:
            self.register_buffer("base", self._first_base())
        else:
            self.base = None

    def value(self, X: Tensor) -> Tensor:
        wide = X.size(-2) < X.size(-1)
        A = self._tangent(X.mT if wide else X)
        if self.map == "matrix_exp":
            Q = exponential(A)
        elif self.map == "cayley":
            Q = cayley(A)
        else:
            # With a base all stored signs are -1; weight decay may move them to zero and a little above.
            Q = householder(A, 0.5 if self.trivialization else 0.0)
        Q = self._rebased(Q)
        return Q.mT if wide else Q

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the tensor for `value`, or for its Q factor if it is not orthogonal.

        Raises:
            RewriterError: without a base, `value` is not in the image of the map.
            NotImplementedError: ``map: matrix_exp`` without a base, for a matrix that is not square.
        """
        require_shape(self.name, value, self.shape)
        require_values(self.name, value)
        wide = value.size(-2) < value.size(-1)
        W = widen(value.mT if wide else value)
        if self.base is not None:
            self._move_base(W)
            X = torch.zeros_like(W)
            # The diagonal has the signs of the Householder map: with -1, no reflection is the identity.
            X.diagonal(dim1=-2, dim2=-1).fill_(-1)
        elif self.map == "householder":
            X = reflectors(W)
        elif self.map == "cayley":
            X = self._preimage(orthonormal(W), W)
        elif W.size(-2) == W.size(-1):
            X = self._preimage(W, W)
        else:
            raise NotImplementedError(
                "a matrix that is not square has no closed-form logarithm: use `trivialization: true`, or "
                "`map: cayley` or `householder`"
            )
        return (X.mT if wide else X).to(value.dtype)

    @torch.no_grad()
    def update_base(self, X: Tensor) -> Tensor:
        """Move the base to the value of X and return the new tensor for that value."""
        return self.right_inverse(self.forward(X))

    def sample(self) -> Tensor:
        """Return a matrix drawn from the uniform (Haar) distribution, a rotation if the map reaches no others."""
        Q = haar(self.noise())
        reaches_all = self.trivialization or self.map == "householder" or Q.size(-1) != Q.size(-2)
        return (Q if reaches_all else _turned(Q)).to(self.dtype)

    def _tangent(self, A: Tensor) -> Tensor:
        return A

    def _first_base(self) -> Tensor:
        *lead, m, n = self.shape or ()
        rows, columns = max(m, n), min(m, n)
        if rows >= _VERY_TALL and rows >= 8 * columns and not self.dtype.is_complex:
            eye = -torch.eye(rows, columns, dtype=wide_dtype(self.dtype), device=self.device)  # reflections
        else:
            eye = torch.eye(rows, dtype=wide_dtype(self.dtype), device=self.device)
        return eye.repeat(*lead, 1, 1) if lead else eye

    def _rebased(self, Q: Tensor) -> Tensor:
        base = self.base
        if base is None:
            return Q
        return widen(base) @ Q if base.size(-2) == base.size(-1) else reflected(widen(base), Q)

    def _move_base(self, W: Tensor) -> None:
        base = self.base
        assert base is not None
        base.copy_(completed(W) if base.size(-2) == base.size(-1) else reflectors(orthonormal(W)))

    def _preimage(self, Q: Tensor, W: Tensor) -> Tensor:
        square = Q.size(-2) == Q.size(-1)
        try:
            Q = rotation(W) if square else Q
        except ValueError as error:
            raise RewriterError(f"{self.name}: {error}; {_OUTSIDE.format(self.map)}") from None
        if self.map == "cayley":
            X = cayley_inverse(Q)
            reached = cayley(X)
        else:
            A = logarithm(Q)
            X = A.tril() - A.diagonal(dim1=-2, dim2=-1).diag_embed() / 2
            reached = exponential(X)
        tolerance = torch.finfo(Q.dtype).eps ** 0.5
        if not torch.allclose(reached, Q, atol=tolerance):
            raise RewriterError(f"{self.name}: it has an eigenvalue -1; {_OUTSIDE.format(self.map)}")
        return X


_OUTSIDE = "no tensor gives it with `map: {}` alone: use `trivialization: true`"


class Orthogonal(_Orthogonal, name="orthogonal"):
    """Matrices with orthonormal columns, or orthonormal rows where they are wide.

    >>> import torch
    >>> Q = Orthogonal(weight=torch.eye(3)).sample()
    >>> torch.allclose(Q.mT @ Q, torch.eye(3), atol=1e-6)
    True

    The parametrization is the one of :func:`torch.nn.utils.parametrizations.orthogonal`: the same tensors
    give the same matrices, so state dicts are interchangeable. Complex matrices become unitary. The kernel of a
    convolution needs ``reshape``.

    Arguments:
        map: how a lower triangle becomes orthogonal: the exponential or the Cayley map of a skew matrix, or a
            product of Householder reflections. Without it, ``matrix_exp`` for square or complex weights, else
            ``householder``, which is for real weights.
        trivialization: map onto the neighbourhood of a base point. The base point is the buffer ``base`` of shape
            ``(..., n, n)``, n the longer side. Any orthogonal matrix can be assigned then. Where n is at least 2048
            and eight times the shorter side k, the base of a real weight is stored as ``stiefel`` stores it, in the
            shape ``(..., n, k)``, with the same values. A state dict with the other base loads, and the step then
            has that one.
    """

    cost = "O(n^2 k) with a square base, else O(n k^2), for n rows and k <= n columns; O(n^3) where n <= 2k"

    trivialization: bool = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given, base = state_dict.get(f"{prefix}base"), self.base
        if isinstance(given, Tensor) and base is not None and given.shape != base.shape:
            n, columns = base.size(-2), min((self.shape or ())[-2:])
            if given.shape[:-1] == base.shape[:-1] and given.size(-1) in (n, columns):
                self.base = base.new_zeros(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SpecialOrthogonal(Orthogonal, name="special_orthogonal"):
    """Rotations: square orthogonal matrices of determinant one (unitary ones, where complex).

    >>> import torch
    >>> R = SpecialOrthogonal(weight=torch.eye(3)).sample()
    >>> torch.allclose(torch.linalg.det(R), torch.tensor(1.0))
    True

    Arguments:
        map: the exponential or the Cayley map of a skew matrix.
        trivialization: map onto the neighbourhood of a base point, the buffer ``base``.
    """

    guarantee = "|Q^T Q - I| <= 10 n eps, with matrix_exp times 1 + |X|, and the determinant is one"
    cost = "O(n^3)"
    takes = ("square",)

    map: Literal["matrix_exp", "cayley"] = "matrix_exp"

    def sample(self) -> Tensor:
        """Return a rotation drawn from the uniform (Haar) distribution."""
        return _turned(haar(self.noise())).to(self.dtype)

    def _move_base(self, W: Tensor) -> None:
        assert self.base is not None
        try:
            self.base.copy_(rotation(W))
        except ValueError as error:
            raise RewriterError(f"special_orthogonal: this orthogonal matrix is no rotation, {error}") from None


def _turned(Q: Tensor) -> Tensor:
    """Return Q with the first column of each reflection negated, so that all are rotations."""
    if not Q.is_complex():
        Q[..., 0] *= torch.linalg.det(Q).sign().unsqueeze(-1)
    return Q
