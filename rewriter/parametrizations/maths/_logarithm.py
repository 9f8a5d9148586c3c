"""The real logarithm of rotations and the logarithm of unitary matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logarithm(Q: Tensor) -> Tensor:
    """Return a skew A with ``exp(A) = Q`` and all eigenvalues within ``[-i pi, i pi]``.

    Arguments:
        Q: orthogonal with determinant one, or unitary; of shape ``(..., n, n)``.
    """
    wide = Q.to(torch.complex128 if Q.is_complex() else torch.float64)
    flat = wide.reshape(-1, *Q.shape[-2:])
    logs = [_unitary(q) if Q.is_complex() else _rotation(q) for q in flat]
    return torch.stack(logs).reshape(Q.shape).to(Q.dtype)


def _unitary(Q: Tensor) -> Tensor:
    angles, W = _angles(Q)
    A: Tensor = W @ torch.diag(1j * angles) @ W.mH
    return A


def _rotation(Q: Tensor) -> Tensor:
    angles, W = _angles(Q)
    # The eigenvalue -1 comes in pairs, and nothing says which of its vectors belong together: i pi and -i pi have to
    # be assigned so that the result is real.
    half_turns = angles.abs() > math.pi - 1e-6
    P = W[:, ~half_turns]
    A = (P @ torch.diag(1j * angles[~half_turns]) @ P.mH).real
    if half_turns.any():
        H = W[:, half_turns]
        basis = torch.linalg.eigh((H @ H.mH).real)[1][:, -H.size(1) :]
        A = A + basis @ _half_turn(basis.mT @ Q @ basis) @ basis.mT
    return (A - A.mT) / 2


def _half_turn(Q: Tensor) -> Tensor:
    """Return the logarithm of a rotation that is almost ``-I``: ``pi J`` plus the logarithm of ``-Q``."""
    remainder = (Q.mT - Q) / 2
    pairing = torch.zeros_like(Q)
    pairing[0::2, 1::2] = torch.eye(Q.size(0) // 2, dtype=Q.dtype, device=Q.device)
    # J turns every plane of the remainder by a right angle; where there is no remainder any planes will do.
    U, _, V = torch.linalg.svd(remainder + 1e-12 * (pairing - pairing.mT))
    A: Tensor = math.pi * (U @ V) + remainder
    return A


def _angles(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return angles and a unitary W with ``Q = W diag(exp(i angles)) W^H``.

    The Hermitian and the skew part of a unitary matrix commute, so that a Hermitian mix of them has its eigenvectors,
    orthonormal even where eigenvalues repeat.
    """
    Z = Q.to(torch.complex128)
    W = torch.linalg.eigh(0.8 * (Z + Z.mH) / 2 + 0.6j * (Z.mH - Z) / 2)[1]
    return torch.linalg.vecdot(W, Z @ W, dim=-2).angle(), W
