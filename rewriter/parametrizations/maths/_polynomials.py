"""Taylor polynomials that are the exponential up to one rounding, in the fewest products known for their degrees.

The factors are those of Bader, Blanes and Casas, "Computing the matrix exponential with an optimized Taylor polynomial
approximation" (2019).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Rows = tuple[tuple[float, ...], ...]
"""For each factor of a product its coefficients of I, A, A^2, A^3 and A^6, as far as given."""


def add_identity(sums: Tensor, factors: Tensor | float) -> Tensor:
    """Add multiples of the identity to sums of ours, in place: constants, of which the graph needs no node."""
    sums.detach().diagonal(dim1=-2, dim2=-1).add_(factors)
    return sums


def fma(Z: Tensor, X: Tensor, Y: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Return ``beta Z + alpha X @ Y``."""
    if X.ndim == 2:
        return torch.addmm(Z, X, Y, beta=beta, alpha=alpha)
    return torch.add(Z if beta == 1 else beta * Z, X @ Y, alpha=alpha)


_ROOT = math.sqrt(177)
LIMITS = {False: (5.12e-2, 5.80e-1, 1.46, 3.01), True: (3.40e-4, 4.99e-2, 2.996e-1, 1.09)}
"""Whether in double precision → the norms up to which degrees 4, 8, 12 and 18 are exact to one rounding."""
EIGHT: Rows = (
    (0.0, (1 + _ROOT) / 132, (1 + _ROOT) / 528),
    ((-271 + 29 * _ROOT) / 210, 11 * (-1 + _ROOT) / 840, 11 * (-9 + _ROOT) / 3360),
    (1.0, 1.0, (857 - 58 * _ROOT) / 630),
)
EIGHT_LAST = (89 - _ROOT) / 2240
"""The factor of the product of the first two, in the other one."""
TWELVE: Rows = (
    (9.0198e-16, 0.46932117595418237389, -0.20099424927047284052, -0.04623946134063071740),
    (5.31597895759871264183, 1.19926790417132231573, 0.01179296240992997031, 0.01108844528519167989),
    (0.18188869982170434744, 0.05502798439925399070, 0.09351590770535414968, 0.00610700528898058230),
    (-2.0861320e-13, -0.13181061013830184015, -0.02027855540589259079, -0.00675951846863086359),
)
EIGHTEEN: Rows = (
    (0.0, -0.10036558103014462001, -0.00802924648241156960, -0.00089213849804572995, 0.0),
    (
        0.0,
        0.39784974949964507614,
        1.36783778460411719922,
        0.49828962252538267755,
        -0.00063789819459472330,
    ),
    (
        -10.9676396052962062593,
        1.68015813878906197182,
        0.05717798464788655127,
        -0.00698210122488052084,
        0.00003349750170860705,
    ),
    (
        -0.09043168323908105619,
        -0.06764045190713819075,
        0.06759613017704596460,
        0.02955525704293155274,
        -0.00001391802575160607,
    ),
    (0.0, 0.0, -0.09233646193671185927, -0.01693649390020817171, -0.00001400867981820361),
)
