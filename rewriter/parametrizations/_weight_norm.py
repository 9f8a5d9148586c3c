"""Weight normalization: length and direction as separate tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Parametrization
from rewriter.parametrizations.maths._eager import Together
from rewriter.parametrizations.maths._precision import widen
from rewriter.parametrizations.maths._unit_slices import scaled_slices, scaling_all


class WeightNorm(Parametrization, name="weight_norm"):
    """Compute a tensor from the norm and the direction of each of its slices along one dimension.

    >>> import torch
    >>> g, v = torch.tensor([[10.0], [2.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> WeightNorm()(g, v)
    tensor([[6., 8.],
            [0., 0.]])

    The tensors are those of :func:`torch.nn.utils.parametrizations.weight_norm`: ``original0`` is g and
    ``original1`` is v. A slice of v that is zero gives zero.

    Arguments:
        dim: the dimension whose slices have their own norms, from -ndim to ndim - 1; ``null`` for one norm
            of the whole tensor. As in torch it is 0 for transposed convolutions too.
    """

    guarantee = "slice i of W along `dim` has norm |g_i|, and zero where v_i is zero"
    cost = "two passes over the tensor"
    reference = "Salimans and Kingma, https://arxiv.org/abs/1602.07868"
    chain_input = 1

    dim: int | None = 0

    def build(self, weight: Tensor | None) -> None:
        dim = self.dim
        if weight is not None and dim is not None and not -weight.ndim <= dim < weight.ndim:
            raise RewriterError(f"weight_norm: dim {dim} is out of range for shape {list(weight.shape)}")

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._value(widen(g), widen(v)).to(v.dtype)
        else:
            value = scaled_slices(g, v, self.dim)
            if value is not None:
                return value
            G, V = widen(g), widen(v)
            value = None if V is v else scaled_slices(G, V, self.dim)
            return (self._value(G, V) if value is None else value).to(v.dtype)

    @classmethod
    def together(cls, steps: Sequence[WeightNorm], stored: Sequence[Sequence[Tensor]]) -> Together | None:
        gs, vs = zip(*stored, strict=True)
        return scaling_all(gs, vs, [step.dim for step in steps])

    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return g, the norms of the slices, and v, the tensor itself (ones in slices that are zero)."""
        norm = self._norm(widen(value))
        return norm.to(value.dtype), torch.where(norm == 0, value.new_ones(()), value)

    def _value(self, G: Tensor, V: Tensor) -> Tensor:
        norm = self._norm(V)
        return V * (G / torch.where(norm == 0, torch.ones_like(norm), norm))

    def _norm(self, V: Tensor) -> Tensor:
        dim = self.dim
        if dim is None:
            norm: Tensor = torch.linalg.vector_norm(V)
            return norm
        others = list(range(V.ndim))
        others.pop(dim % V.ndim)
        if len(others) == 0:
            return V.abs()
        norms: Tensor = torch.linalg.vector_norm(V, dim=others, keepdim=True)
        return norms
