"""What ``torch.*`` means in a spec: torch's own parametrization classes, with torch's argument names."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rewriter._torch import _VF, OrthogonalMaps, TorchOrthogonal, TorchSpectralNorm, TorchWeightNorm
from rewriter.parametrizations._foreign import WidenedBothWays
from rewriter.parametrizations.maths._checks import require_matrix
from rewriter.parametrizations.maths._precision import widen


class Orthogonal(WidenedBothWays, TorchOrthogonal):  # type: ignore[misc]
    """The class behind :func:`torch.nn.utils.parametrizations.orthogonal`.

    >>> import torch
    >>> Orthogonal(torch.eye(3), "cayley").right_inverse(torch.eye(3)).shape
    torch.Size([3, 3])

    Each slice along the last two dimensions is a matrix of its own.

    Arguments:
        weight: filled in by the site.
        orthogonal_map: without it, ``matrix_exp`` for square or complex weights, else ``householder``.
        use_trivialization: store a base point in the buffer ``base``.
    """

    guarantee = "orthonormal columns (rows where the matrix is wide)"
    cost = "O(n^3), n the longer side"
    reference = "Lezcano-Casado, https://arxiv.org/abs/1909.09501"

    def __init__(
        self,
        weight: Tensor,
        orthogonal_map: Literal["matrix_exp", "cayley", "householder"] | None = None,
        use_trivialization: bool = True,
    ) -> None:
        require_matrix("torch.Orthogonal", weight)
        if orthogonal_map is None:
            square = weight.size(-2) == weight.size(-1)
            orthogonal_map = "matrix_exp" if square or weight.is_complex() else "householder"
        super().__init__(widen(weight), OrthogonalMaps[orthogonal_map], use_trivialization=use_trivialization)


class SpectralNorm(WidenedBothWays, TorchSpectralNorm):
    """The class behind :func:`torch.nn.utils.parametrizations.spectral_norm`.

    >>> import torch
    >>> sorted(SpectralNorm(torch.eye(3)).state_dict())
    ['_u', '_v']

    Arguments:
        weight: filled in by the site.
        n_power_iterations: steps of the power method per forward in train mode.
        dim: the dimension of the outputs; by default 1 for transposed convolutions, else 0.
        eps: added to a norm before dividing by it.
    """

    stateful = True
    guarantee = "the largest singular value is about one, up to the error of the power method"
    cost = "two matrix-vector products per power iteration"
    reference = "Miyato et al., https://arxiv.org/abs/1802.05957"

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int | None = None,
        eps: float = 1e-12,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__(widen(weight), n_power_iterations, int(transposed) if dim is None else dim, eps)


class WeightNorm(WidenedBothWays, TorchWeightNorm):  # type: ignore[misc]
    """The class behind :func:`torch.nn.utils.parametrizations.weight_norm`.

    >>> import torch
    >>> [part.shape for part in WeightNorm().right_inverse(torch.ones(3, 2))]
    [torch.Size([3, 1]), torch.Size([3, 2])]

    Arguments:
        dim: the dimension along which each slice has its own norm; ``null`` for one norm of the whole tensor.
    """

    chain_input = 1
    guarantee = "the slices of W along `dim` have the norms g"
    cost = "two passes over the tensor"
    reference = "Salimans and Kingma, https://arxiv.org/abs/1602.07868"

    def __init__(self, dim: int | None = 0) -> None:
        super().__init__(dim)

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:  # with names, for TorchScript
        return _VF._weight_norm(widen(weight_v), widen(weight_g), self.dim).to(weight_v.dtype)
