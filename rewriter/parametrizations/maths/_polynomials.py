"""Polynomials that are the exponential up to one rounding, in the fewest matrix products known for their degrees.

Of any matrix they are Taylor's, with the factors of Bader, Blanes and Casas, "Computing the matrix exponential with
an optimized Taylor polynomial approximation" (2019).

The eigenvalues of a skew matrix are imaginary, and all that counts is the error on the interval between the largest
two, as in Bader, Blanes, Casas and Seydaoglu, "An efficient algorithm to compute the exponential of skew-Hermitian
matrices for the time integration of the Schrödinger equation" (2022). There, a Chebyshev expansion of the same degree
is good for twice the norm. Those here are the integrals from 0 of the Chebyshev expansions of one degree less, so that
gradients are exact to a few roundings too, and the exponential of zero is the identity. Newton's method, from Taylor's
factors on, brought them into the same form.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Rows = tuple[tuple[float, ...], ...]
"""For each factor of a product its coefficients of I, A, A^2, A^3 and A^6, as far as given."""


class Series(NamedTuple):
    """Polynomials of rising degree.

    Arguments:
        limits: the norms up to which those of degrees 4, 8, 12 and 18 are exact to one rounding. The first is always
            Taylor's.
        eight: the factors of degree 8.
        eight_last: what multiplies the product of two of them in the other one.
        twelve: the factors of degree 12.
        eighteen: the factors of degree 18; ``None`` where halving the matrix once more serves as well.
    """

    limits: tuple[float, ...]
    eight: Rows
    eight_last: float
    twelve: Rows
    eighteen: Rows | None


def series_of(skew: bool, double: bool) -> Series:
    """Return the polynomials for skew matrices or for any, in double or in single precision."""
    return _SERIES[skew, double]


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
_TAYLOR = Series(
    limits=(),
    eight=(
        (0.0, (1 + _ROOT) / 132, (1 + _ROOT) / 528),
        ((-271 + 29 * _ROOT) / 210, 11 * (-1 + _ROOT) / 840, 11 * (-9 + _ROOT) / 3360),
        (1.0, 1.0, (857 - 58 * _ROOT) / 630),
    ),
    eight_last=(89 - _ROOT) / 2240,
    twelve=(
        (9.0198e-16, 0.46932117595418237389, -0.20099424927047284052, -0.04623946134063071740),
        (5.31597895759871264183, 1.19926790417132231573, 0.01179296240992997031, 0.01108844528519167989),
        (0.18188869982170434744, 0.05502798439925399070, 0.09351590770535414968, 0.00610700528898058230),
        (-2.0861320e-13, -0.13181061013830184015, -0.02027855540589259079, -0.00675951846863086359),
    ),
    eighteen=(
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
    ),
)
_SKEW_SINGLE = Series(
    limits=(5.12e-2, 1.1, 2.8),
    eight=(
        (0.0, 0.10407757667648891, 0.026161310221851898),
        (0.546780829945324, 0.16463322585714138, 0.015340468063295743),
        (1.0, 0.9999995970428841, 0.13547934562352654),
    ),
    eight_last=0.03489024851632898,
    twelve=(
        (0.0, 0.5298216317457688, -0.0907028426951183, -0.024069594321210547),
        (4.873679501505898, 1.1604749447646023, 0.033453116534947085, 0.011718908835640373),
        (0.1972042828291957, 0.045809320246621064, 0.0734762836487079, 0.0053275541555136315),
        (0.0, -0.16404432495060675, -0.0191694191778496, -0.006487373372651445),
    ),
    eighteen=None,
)
_SKEW_DOUBLE = Series(
    limits=(3.40e-4, 0.1, 0.59, 2.1),
    eight=(
        (0.0, 0.10832816557149252, 0.027083250508540897),
        (0.5467605977574679, 0.16115564115414172, 0.014101376177029244),
        (1.0, 0.9999999999999981, 0.13549293482835423),
    ),
    eight_last=0.03380198335785284,
    twelve=(
        (0.0, 0.4803164470510075, -0.19295288917338047, -0.045102018912344735),
        (5.291394588063654, 1.2003592372221574, 0.012888753868555333, 0.011096096367580284),
        (0.18267930247142714, 0.0531051567088879, 0.09254580943059594, 0.006083564785464913),
        (0.0, -0.1333065838582605, -0.02022846054634281, -0.006747271009083289),
    ),
    eighteen=(
        (0.0, -0.10885937972174484, -0.007990989821875094, -0.0008911087843836556, 0.0),
        (0.0, 0.5300755363769118, 1.0965065833449528, 0.26413101619872653, -0.0005495281241693971),
        (
            -2.9983000825027517,
            1.728029676021536,
            0.07615365751097325,
            -0.0027813951355247805,
            3.3995990274339976e-05,
        ),
        (
            -0.30291844972892035,
            -0.2756211928517541,
            0.048034710583364996,
            0.022490378523576136,
            -9.906420785868824e-06,
        ),
        (0.0, 0.0, -0.1345389245141563, -0.012468400014445219, -1.3601191974457597e-05),
    ),
)
_SERIES = {
    (False, False): _TAYLOR._replace(limits=(5.12e-2, 5.80e-1, 1.46, 3.01)),
    (False, True): _TAYLOR._replace(limits=(3.40e-4, 4.99e-2, 2.996e-1, 1.09)),
    (True, False): _SKEW_SINGLE,
    (True, True): _SKEW_DOUBLE,
}
