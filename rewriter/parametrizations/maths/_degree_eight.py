"""The polynomial of degree 8, for matrices of norm about one, as trained weights give them.

Autograd differentiates each of its sums. The gradient by hand fuses the sums with the products, and a skew matrix
saves one product: forward and backward of a matrix of a hundred rows take a quarter less time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.parametrizations.maths._eager import executed_now
from rewriter.parametrizations.maths._polynomials import Series, add_identity, fma


def degree_eight(A: Tensor, A2: Tensor, series: Series, skew: bool) -> Tensor:
    """Return the polynomial of degree 8 of A.

    Arguments:
        A: of shape ``(..., n, n)``.
        A2: its square.
        series: whose polynomial.
        skew: A is skew-symmetric or skew-Hermitian, and so is the gradient that its source receives.
    """
    if skew and A.ndim == 2 and type(A) is Tensor and A.requires_grad and torch.is_grad_enabled() and executed_now():
        value: Tensor = _Skew.apply(A, A2.detach(), series)  # type: ignore[no-untyped-call]
        return value
    _, upper, lower = _factors(A, A2, series)
    return _last(A, A2, upper, lower, series)


def _factors(A: Tensor, A2: Tensor, series: Series) -> tuple[Tensor, Tensor, Tensor]:
    """Return the second factor of ``A^4 + ...``, and both of the last product.

    Each is over its coefficient of A, for a sum to be one operation; the last product puts them right.
    """
    first, second, _ = series.eight
    left, right = _sum_over(A, A2, first), _sum_over(A, A2, second)
    A4 = A2 @ left
    square, fourth = _shares(series)
    return left, torch.add(A4, A2, alpha=square), torch.add(right, A4, alpha=fourth)


def _last(A: Tensor, A2: Tensor, upper: Tensor, lower: Tensor, series: Series) -> Tensor:
    (_, a, _), (_, b, _), rest = series.eight
    return fma(_sum_over(A, A2, rest), upper, lower, rest[1], a * b)


def _shares(series: Series) -> tuple[float, float]:
    """Return what the upper factor has of A^2, and the lower one of A^4."""
    (_, a, _), (_, b, _), _ = series.eight
    return 2 / 3 / a, series.eight_last * a / b


def _sum_over(A: Tensor, A2: Tensor, row: tuple[float, ...]) -> Tensor:
    """Return a polynomial of degree 2, divided by its coefficient of A."""
    total = torch.add(A, A2, alpha=row[2] / row[1])
    return add_identity(total, row[0] / row[1]) if row[0] else total


class _Skew(torch.autograd.Function):
    """The polynomial of a skew A as one node, whose gradient is correct up to a symmetric part.

    That part never reaches a skew A. All of the gradient is made of differentiable operations.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, A2: Tensor, series: Series) -> Tensor:
        left, upper, lower = _factors(A, A2, series)
        ctx.series = series
        ctx.save_for_backward(A, A2, left, upper, lower)
        return _last(A, A2, upper, lower, series)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g,) = gradients
        A, A2, left, upper, lower = ctx.saved_tensors
        series: Series = ctx.series
        if torch.is_grad_enabled():  # the gradient is to be differentiated, and these are numbers
            A2 = A @ A
            left, upper, lower = _factors(A, A2, series)
        (_, a, a2), (_, b, b2), (_, c, c2) = series.eight
        square, fourth = _shares(series)
        # Gradients by the two factors of the last product, by A^4, A^2 and A, all over a b.
        G_upper, G_lower = g @ lower.mH, upper.mH @ g
        G4 = torch.add(G_upper, G_lower, alpha=fourth)
        G2 = torch.add(G_upper, G_lower, alpha=b2 / b / square).add(g, alpha=c2 / a / b / square)
        G_left = A2 @ G4
        G1 = (G_left + G_lower).add(g, alpha=c / a / b)
        G2 = torch.addmm(G2, G4, left.mH, beta=square).add(G_left, alpha=a2 / a)
        return torch.addmm(G1, G2 + G2.mH, A, beta=a * b, alpha=-a * b), None, None
