"""Weights stored as small integers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._groups import Scheme, cut, grouping
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_real
from rewriter.parametrizations.maths._precision import widen


@register("quantized_storage")
class QuantizedStorage(nn.Module):
    """Store the weight as int8 and compute scale · integer.

    >>> import torch
    >>> step = QuantizedStorage(weight=torch.tensor([[0.5, -1.27]]))
    >>> step.right_inverse(torch.tensor([[0.5, -1.27]]))
    tensor([[  50, -127]], dtype=torch.int8)
    >>> step(torch.tensor([[50, -127]], dtype=torch.int8))
    tensor([[ 0.5000, -1.2700]])

    What is stored cannot be trained: integers have no gradient, and an optimizer must not get them. The right
    inverse chooses the scales anew.

    Arguments:
        bits: of a number, 2 to 8; each takes one byte.
        scheme: what has a scale of its own: the tensor, a channel, or a group of entries of a channel.
        group_size: for ``per_group``, the entries of a group, neighbours along `axis`.
        axis: the channels (per_channel, default 0), or what is cut into groups (per_group, default -1).
        weight: filled in by the site; its dtype is that of the value.

    Raises:
        RewriterError: arguments that do not go together, or do not fit the weight.
    """

    guarantee = "within half a step of the assigned value; not trainable"
    cost = "one multiplication per entry"
    reference = "Dettmers et al. 2022 (LLM.int8()), arXiv:2208.07339"
    freezes_original = True
    storage_dtype = torch.int8

    def __init__(
        self,
        bits: int = 8,
        scheme: Scheme = "per_channel",
        group_size: int | None = None,
        axis: int | None = None,
        *,
        weight: Tensor,
    ) -> None:
        super().__init__()
        require_real("quantized_storage", weight)
        if not 2 <= bits <= 8:
            raise RewriterError(f"quantized_storage stores 2 to 8 bits, not {bits}")
        self.bits, self.scheme, self.largest = bits, scheme, 2.0 ** (bits - 1) - 1
        self.axis, self.group, self.dims = grouping("quantized_storage", weight, scheme, axis, group_size)
        self.register_buffer("scale", self._scales(weight))
        self.scale: Tensor

    def _scales(self, value: Tensor) -> Tensor:
        pieces = cut(widen(value.detach()), self.axis, self.group)
        scales: Tensor = pieces.abs().amax(self.dims, keepdim=True) / self.largest
        return scales.clamp_min(1e-6 if value.dtype == torch.float16 else 1e-30).to(value.dtype)

    def forward(self, X: Tensor) -> Tensor:
        scale = widen(self.scale)
        value = cut(X, self.axis, self.group).to(scale.dtype) * scale
        return value.reshape(X.shape).to(self.scale.dtype)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the integers nearest to `value`, and set the scales."""
        self.scale.copy_(self._scales(value))
        codes = torch.round(cut(widen(value), self.axis, self.group) / widen(self.scale))
        return codes.clamp(-self.largest, self.largest).reshape(value.shape).to(torch.int8)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scheme={self.scheme}"
