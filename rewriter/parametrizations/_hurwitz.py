"""Matrices of stable linear systems."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Parametrization
from rewriter.parametrizations.maths._checks import require_shape
from rewriter.parametrizations.maths._cholesky import cholesky, positive_triangle, positive_triangle_inverse
from rewriter.parametrizations.maths._precision import widen


class HurwitzStable(Parametrization, name="hurwitz_stable"):
    """Matrices whose eigenvalues all have a negative real part, so that ``x' = W x`` decays.

    >>> import torch
    >>> step = HurwitzStable(decay=0.5, weight=torch.empty(3, 3))
    >>> bool((torch.linalg.eigvals(step.sample()).real < -0.5).all())
    True

    The matrix is ``P (S - Q/2) - decay I`` with P and Q positive definite and S skew. Two tensors are stored:
    ``original0`` has S in its strict upper triangle and the Cholesky factor of Q in the rest, ``original1`` is
    the Cholesky factor of P.

    Arguments:
        decay: how far left of zero the real parts stay.
    """

    guarantee = "the real parts of the eigenvalues are below -decay, up to n eps |W|"
    cost = "6 n^3"
    reference = "Duan and Patton, J. Dyn. Syst. Meas. Control 120 (1998)"
    takes = ("square", "real")
    batched = True

    decay: float = 0.0

    def build(self, weight: Tensor) -> None:
        if self.decay < 0:
            raise RewriterError(f"hurwitz_stable: decay must not be negative, it is {self.decay}")

    def forward(self, X0: Tensor, X1: Tensor) -> Tensor:
        X, Y = widen(X0), widen(X1)
        L, C = positive_triangle(X), positive_triangle(Y)
        upper = X.triu(1)
        inner = upper - upper.mT - L @ L.mT / 2
        eye = torch.eye(X.size(-1), dtype=X.dtype, device=X.device)
        return (C @ (C.mT @ inner) - self.decay * eye).to(X0.dtype)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two tensors for `value`.

        Raises:
            RewriterError: an eigenvalue of `value` does not lie left of -decay, or almost not.
        """
        require_shape("hurwitz_stable", value, self.shape)
        if value.is_meta:  # of which only the shapes matter
            return torch.empty_like(value), torch.empty_like(value)
        W = widen(value).double()
        eye = torch.eye(W.size(-1), dtype=W.dtype, device=W.device)
        A = W + self.decay * eye
        if not (torch.linalg.eigvals(A).real < 0).all():
            raise RewriterError(
                f"hurwitz_stable: the weight has an eigenvalue with a real part of -{self.decay} or more; "
                "use `init: sample`"
            )
        P = _lyapunov(A)
        inner = P @ A
        S, Q = (inner - inner.mT) / 2, -(inner + inner.mT)
        X0 = S.triu(1) + positive_triangle_inverse(cholesky(Q)).tril()
        X1 = positive_triangle_inverse(cholesky(torch.linalg.inv(P)))
        if not torch.allclose(self.forward(X0, X1), W, rtol=1e-4, atol=1e-4 * float(W.abs().max())):
            raise RewriterError(
                "hurwitz_stable: the weight is so close to having an unstable eigenvalue that its Lyapunov equation "
                "cannot be solved; use `init: sample`"
            )
        return X0.to(value.dtype), X1.to(value.dtype)

    def sample(self) -> Tensor:
        """Return the matrix of two normal tensors of variance 1/n."""
        first, second = self.noise(), self.noise()
        root = first.size(-1) ** 0.5
        return self.forward(first / root, second / root).to(self.dtype)


def _lyapunov(A: Tensor) -> Tensor:
    """Return the P with ``A^T P + P A = -I`` for stable A, by Newton's iteration for the matrix sign function.

    Roberts, Int. J. Control 32 (1980); the scaling is Byers'.
    """
    n = A.size(-1)
    E = torch.eye(n, dtype=A.dtype, device=A.device).expand_as(A)
    for _ in range(60):
        inverse = torch.linalg.inv(A)
        scale = torch.exp(-torch.linalg.slogdet(A)[1] / n)[..., None, None]
        E = (E * scale + inverse.mT @ E @ inverse / scale) / 2
        following = (A * scale + inverse / scale) / 2
        done = torch.allclose(following, A, rtol=0.0, atol=1e-14 * n)
        A = following
        if done:
            break
    return E / 2
