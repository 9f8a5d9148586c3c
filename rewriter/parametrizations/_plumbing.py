"""Steps that move or mark a tensor: identity, transpose, cast, detach, dropout."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Parametrization


class Identity(Parametrization, name="identity"):
    """Leave the tensor as it is.

    >>> import torch
    >>> Identity()(torch.tensor([1.0]))
    tensor([1.])
    """

    guarantee = "the value is X"
    cost = "none"
    reference = "torch.nn.utils.prune.identity"
    batched = True

    def forward(self, X: Tensor) -> Tensor:
        return X

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def fuse(self, next: nn.Module) -> nn.Module | None:
        """Return `next`."""
        return next


class Transpose(Parametrization, name="transpose"):
    """Swap two dimensions.

    >>> import torch
    >>> Transpose()(torch.zeros(2, 3)).shape
    torch.Size([3, 2])

    Arguments:
        dim0: one of the dimensions.
        dim1: the other one.
    """

    guarantee = "the value is X with dim0 and dim1 swapped"
    cost = "none: a view"
    preserves_shape = False

    dim0: int = -2
    dim1: int = -1

    def build(self, weight: Tensor | None) -> None:
        self.batched = self.dim0 < 0 and self.dim1 < 0

    def forward(self, X: Tensor) -> Tensor:
        return X.transpose(self.dim0, self.dim1)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.transpose(self.dim0, self.dim1).contiguous()

    def cancels(self, next: nn.Module) -> bool:
        """Return whether `next` swaps the same dimensions."""
        return isinstance(next, Transpose) and {self.dim0, self.dim1} == {next.dim0, next.dim1}


FloatName = Literal["float16", "bfloat16", "float32", "float64"]

_EXACT_IN: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    torch.float64: (),
}


class Cast(Parametrization, name="cast"):
    """Convert to another floating dtype; a cast to a wider one and back again cancels.

    >>> import torch
    >>> Cast("bfloat16")(torch.ones(1))
    tensor([1.], dtype=torch.bfloat16)

    The value has another dtype than the weight, so the rule needs ``unsafe: true``. The right inverse converts back
    to the dtype of the weight.

    Arguments:
        dtype: ``float16``, ``bfloat16``, ``float32`` or ``float64``; from Python a ``torch.dtype`` too.
    """

    guarantee = "the value has this dtype"
    cost = "one pass over the tensor"
    batched = True
    preserves_dtype = False

    dtype: FloatName | torch.dtype  # type: ignore[assignment]

    def build(self, weight: Tensor | None) -> None:
        self.dtype = _float_dtype(self.dtype)
        self.source = self.dtype if weight is None else _float_dtype(weight.dtype)
        self.known = weight is not None

    def forward(self, X: Tensor) -> Tensor:
        return X.to(self.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.to(self.source) if self.known else value

    def fuse(self, next: nn.Module) -> nn.Module | None:
        """Return `next` if this cast loses nothing: both are the same, or this dtype contains X's."""
        return next if isinstance(next, Cast) and (self.dtype == next.dtype or self._is_exact()) else None

    def cancels(self, next: nn.Module) -> bool:
        """Return whether `next` converts back to the dtype of X, and this step loses nothing."""
        return isinstance(next, Cast) and self._is_exact() and next.dtype == self.source

    def _is_exact(self) -> bool:
        return self.known and (self.dtype == self.source or self.dtype in _EXACT_IN[self.source])


class Detach(Parametrization, name="detach"):
    """Stop the gradient: the tensor is used, and not trained through this step.

    >>> import torch
    >>> Detach()(torch.ones(1, requires_grad=True)).requires_grad
    False
    """

    guarantee = "the value is X, its gradient none"
    cost = "none"
    batched = True

    def forward(self, X: Tensor) -> Tensor:
        return X.detach()

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def fuse(self, next: nn.Module) -> nn.Module | None:
        """Return one detach for two."""
        return self if isinstance(next, Detach) else None


class WeightDropout(Parametrization, name="weight_dropout"):
    """Make random entries zero while training, one draw per forward, and scale the others up (DropConnect).

    >>> import torch
    >>> WeightDropout(0.5).eval()(torch.ones(2))
    tensor([1., 1.])

    On a recurrent kernel this is the weight drop of AWD-LSTM: one mask for all time steps.

    Arguments:
        p: the probability of an entry to be zero, in [0, 1].
    """

    guarantee = "in train mode the expected value is X; in eval mode the value is X"
    cost = "one random number and one multiplication per entry, in train mode"
    reference = "Wan et al. 2013 (DropConnect); Merity, Keskar, Socher 2017, arXiv:1708.02182"
    random = True

    p: float = 0.5

    def build(self, weight: Tensor | None) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise RewriterError(f"weight_dropout's p is a probability, not {self.p}")

    def forward(self, X: Tensor) -> Tensor:
        return F.dropout(X, self.p, self.training)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


def _float_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in _EXACT_IN:
        known = ", ".join(str(known).removeprefix("torch.") for known in _EXACT_IN)
        raise RewriterError(f"cast converts floating tensors to {known}; {dtype} is none of them")
    return found
