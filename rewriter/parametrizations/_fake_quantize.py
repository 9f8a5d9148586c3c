"""Fake quantization: values on a grid of few numbers, with gradients that pass straight through."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._groups import Scheme, cut, grouping, straight_through
from rewriter.parametrizations._registry import register
from rewriter.parametrizations.maths._checks import require_real
from rewriter.parametrizations.maths._precision import widen


@register("fake_quantize")
class FakeQuantize(nn.Module):
    """Round to a grid of 2^bits numbers, and pass the gradient straight through the rounding.

    >>> import torch
    >>> weight = torch.tensor([[0.0, 0.3, -0.7, 1.4]])
    >>> FakeQuantize(bits=2, weight=weight)(weight)
    tensor([[0.0000, 0.0000, 0.0000, 1.4000]])

    Arguments:
        bits: of a number, 2 to 16.
        scheme: what has a step size of its own: the tensor, a channel, or a group of entries of a channel.
        group_size: for ``per_group``, the entries of a group, neighbours along `axis`.
        symmetric: the grid is symmetric about zero; else it spans zero, the smallest and the largest entry.
        step: ``dynamic`` computes the step from the current entries; ``learned`` trains it (LSQ: a parameter
            ``step_size``, symmetric only; entries beyond the grid have no gradient).
        axis: the channels (per_channel, default 0), or what is cut into groups (per_group, default -1).
        weight: filled in by the site.

    Raises:
        RewriterError: arguments that do not go together, or do not fit the weight.
    """

    guarantee = "at most 2^bits different values per group, zero among them"
    cost = "about six passes over the tensor"
    reference = "Jacob et al. 2017, arXiv:1712.05877; Esser et al. 2019 (LSQ), arXiv:1902.08153"

    def __init__(
        self,
        bits: int = 8,
        scheme: Scheme = "per_tensor",
        group_size: int | None = None,
        symmetric: bool = True,
        step: Literal["dynamic", "learned"] = "dynamic",
        axis: int | None = None,
        *,
        weight: Tensor,
    ) -> None:
        super().__init__()
        require_real("fake_quantize", weight)
        if not 2 <= bits <= 16:
            raise RewriterError(f"fake_quantize has 2 to 16 bits, not {bits}; for one bit there is `binary`")
        if step == "learned" and not symmetric:
            raise RewriterError("fake_quantize learns the step of a symmetric grid only; remove symmetric: false")
        self.bits, self.scheme, self.symmetric, self.step = bits, scheme, symmetric, step
        self.axis, self.group, self.dims = grouping("fake_quantize", weight, scheme, axis, group_size)
        self.low = -(2.0 ** (bits - 1)) if symmetric else 0.0
        self.high = self.low + 2.0**bits - 1
        self.step_size: nn.Parameter | None = None
        self.balance = 1.0
        if step == "learned":
            pieces = cut(widen(weight.detach()), self.axis, self.group)
            mean = pieces.abs().mean(self.dims, keepdim=True)
            self.step_size = nn.Parameter((2 * mean / self.high**0.5).clamp_min(1e-12))
            self.balance = (self.step_size.numel() / (weight.numel() * self.high)) ** 0.5

    def forward(self, X: Tensor) -> Tensor:
        pieces = cut(widen(X), self.axis, self.group)
        step_size = self.step_size
        if step_size is not None:
            step = widen(step_size).abs().clamp_min(1e-12)
            step = straight_through(step, step * self.balance)
            codes = torch.clamp(pieces / step, self.low, self.high)
            value = straight_through(torch.round(codes), codes) * step
        elif self.symmetric:
            step = pieces.abs().amax(self.dims, keepdim=True).clamp_min(1e-37) / self.high
            codes = torch.clamp(torch.round(pieces / step), self.low, self.high)
            value = straight_through(codes * step, pieces)
        else:
            lowest = pieces.amin(self.dims, keepdim=True).clamp_max(0.0)
            highest = pieces.amax(self.dims, keepdim=True).clamp_min(0.0)
            step = (highest - lowest).clamp_min(1e-37) / self.high
            zero = torch.round(-lowest / step)
            codes = torch.clamp(torch.round(pieces / step) + zero, self.low, self.high)
            value = straight_through((codes - zero) * step, pieces)
        return value.reshape(X.shape).to(X.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        grouped = f", group_size={self.group}" if self.group else ""
        return f"bits={self.bits}, scheme={self.scheme}{grouped}, symmetric={self.symmetric}, step={self.step}"
