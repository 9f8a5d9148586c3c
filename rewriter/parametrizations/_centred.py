"""Tensors whose mean along one dimension is zero."""

from __future__ import annotations

from torch import Tensor

from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._precision import Precise


@register("centred")
class Centred(Precise):
    """Subtract the mean along one dimension.

    >>> import torch
    >>> Centred()(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    tensor([[-1.,  1.],
            [ 0.,  0.]])

    Arguments:
        dim: the dimension along which the mean becomes zero.
    """

    guarantee = "the mean along `dim` is zero up to rounding"
    cost = "two passes over the tensor"
    reference = "Qiao et al., Weight standardization, https://arxiv.org/abs/1903.10520"

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def value(self, X: Tensor) -> Tensor:
        return X - X.mean(dim=self.dim, keepdim=True)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value` itself: its own mean is what goes away."""
        return value

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
