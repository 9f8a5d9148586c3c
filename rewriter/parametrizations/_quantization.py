"""Quantization: weights on a grid of few numbers, of one bit, of three values, and stored as integers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Parametrization
from rewriter.parametrizations.maths._precision import widen

Scheme = Literal["per_tensor", "per_channel", "per_group"]


class _Quantized(Parametrization):
    """A member whose entries share scales: all of a tensor, those of a channel, or a group of a channel."""

    takes = ("real",)

    def group(self, weight: Tensor, scheme: Scheme, axis: int | None, group_size: int | None) -> None:
        """Set how `cut` divides the weight: an axis, a group size (0: no division), the dimensions of one scale.

        Axis and dimensions count from the end, the dimensions after the division.
        """
        name, ndim = self.name, weight.dim()
        if ndim == 0:
            raise RewriterError(f"{name} acts on tensors of one or more dimensions")
        if (group_size is None) == (scheme == "per_group"):
            raise RewriterError(f"{name}: group_size goes with scheme: per_group, and only with it")
        if axis is not None and scheme == "per_tensor":
            raise RewriterError(f"{name}: an axis goes with scheme: per_channel or per_group")
        if axis is None:
            axis = 0 if scheme == "per_channel" else -1
        if ndim < 2 and scheme == "per_channel":
            raise RewriterError(f"{name}: per_channel wants two or more dimensions, not {ndim}; use per_tensor")
        if not -ndim <= axis < ndim:
            raise RewriterError(f"{name}: axis {axis} is none of a weight of shape {list(weight.shape)}")
        self.last, self.entries = axis if axis < 0 else axis - ndim, 0
        self.dims = [-1 - i for i in range(ndim) if scheme == "per_tensor" or -1 - i != self.last]
        if scheme == "per_group":
            if group_size is None or group_size < 1 or weight.shape[axis] % group_size:
                raise RewriterError(
                    f"{name}: group_size {group_size} does not divide axis {axis} of shape {list(weight.shape)}"
                )
            self.entries, self.dims = group_size, [self.last]

    def cut(self, X: Tensor) -> Tensor:
        """Return X with the axis divided into groups, each a dimension of its own."""
        return torch.unflatten(X, self.last, [-1, self.entries]) if self.entries > 0 else X

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


def straight_through(value: Tensor, X: Tensor) -> Tensor:
    """Return `value` with the gradient of X: the difference that carries it is exactly zero."""
    return value.detach() + (X - X.detach())


class FakeQuantize(_Quantized, name="fake_quantize"):
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
        axis: the channels (per_channel, default 0), or the dimension of the groups (per_group, default -1).
    """

    guarantee = "at most 2^bits different values per group, zero among them"
    cost = "about six passes over the tensor"
    reference = "Jacob et al. 2017, arXiv:1712.05877; Esser et al. 2019 (LSQ), arXiv:1902.08153"

    bits: int = 8
    scheme: Scheme = "per_tensor"
    group_size: int | None = None
    symmetric: bool = True
    step: Literal["dynamic", "learned"] = "dynamic"
    axis: int | None = None

    def build(self, weight: Tensor) -> None:
        if not 2 <= self.bits <= 16:
            raise RewriterError(f"fake_quantize has 2 to 16 bits, not {self.bits}; for one bit there is `binary`")
        if self.step == "learned" and not self.symmetric:
            raise RewriterError("fake_quantize learns the step of a symmetric grid only; remove symmetric: false")
        self.group(weight, self.scheme, self.axis, self.group_size)
        self.low = -(2.0 ** (self.bits - 1)) if self.symmetric else 0.0
        self.high = self.low + 2.0**self.bits - 1
        self.step_size: nn.Parameter | None = None
        self.balance = 1.0
        if self.step == "learned":
            mean = self.cut(widen(weight.detach())).abs().mean(self.dims, keepdim=True)
            self.step_size = nn.Parameter((2 * mean / self.high**0.5).clamp_min(1e-12))
            self.balance = (self.step_size.numel() / (weight.numel() * self.high)) ** 0.5

    def forward(self, X: Tensor) -> Tensor:
        pieces = self.cut(widen(X))
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


class Binary(_Quantized, name="binary"):
    """Keep the sign of each entry and one magnitude per channel: mean |X| · sign X (XNOR-Net).

    >>> import torch
    >>> weight = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
    >>> Binary(weight=weight)(weight)
    tensor([[ 2.0000, -2.0000],
            [ 0.5000,  0.5000]])

    The gradient of the sign passes straight through where |X| <= 1 and is zero elsewhere; that of the mean
    is exact. The sign of zero is one.

    Arguments:
        scheme, axis, group_size: as of ``fake_quantize``.
    """

    guarantee = "two values per group, opposite to each other"
    cost = "about four passes over the tensor"
    reference = "Rastegari et al. 2016 (XNOR-Net), arXiv:1603.05279"

    scheme: Scheme = "per_channel"
    axis: int | None = None
    group_size: int | None = None

    def build(self, weight: Tensor) -> None:
        self.group(weight, self.scheme, self.axis, self.group_size)

    def forward(self, X: Tensor) -> Tensor:
        pieces = self.cut(widen(X))
        signs = torch.where(pieces < 0, -1.0, 1.0).to(pieces.dtype)
        signs = straight_through(signs, torch.clamp(pieces, -1.0, 1.0))
        value = signs * pieces.abs().mean(self.dims, keepdim=True)
        return value.reshape(X.shape).to(X.dtype)


class Ternary(_Quantized, name="ternary"):
    """Round to -a, 0 or a: zero below 0.7 · mean |X|, and `a` the mean magnitude of the others (TWN).

    >>> import torch
    >>> weight = torch.tensor([[0.1, -1.0, 3.0]])
    >>> Ternary(weight=weight)(weight)
    tensor([[ 0., -2.,  2.]])

    The gradient passes straight through.

    Arguments:
        threshold: which part of the mean magnitude an entry must exceed.
        scheme, axis, group_size: as of ``fake_quantize``.
    """

    guarantee = "three values per group: zero and two opposite ones"
    cost = "about six passes over the tensor"
    reference = "Li, Zhang, Liu 2016 (Ternary Weight Networks), arXiv:1605.04711"

    threshold: float = 0.7
    scheme: Scheme = "per_tensor"
    axis: int | None = None
    group_size: int | None = None

    def build(self, weight: Tensor) -> None:
        self.group(weight, self.scheme, self.axis, self.group_size)
        if not 0 <= self.threshold < 1:
            raise RewriterError(f"ternary's threshold is in [0, 1), not {self.threshold}")

    def forward(self, X: Tensor) -> Tensor:
        pieces = self.cut(widen(X))
        sizes = pieces.abs()
        large = (sizes > self.threshold * sizes.mean(self.dims, keepdim=True)).to(pieces.dtype)
        counts = large.sum(self.dims, keepdim=True).clamp_min(1.0)
        magnitude = (sizes * large).sum(self.dims, keepdim=True) / counts
        value = straight_through(torch.sign(pieces) * large * magnitude, pieces)
        return value.reshape(X.shape).to(X.dtype)


class QuantizedStorage(_Quantized, name="quantized_storage"):
    """Store the weight as int8 and compute scale · integer.

    >>> import torch
    >>> step = QuantizedStorage(weight=torch.tensor([[0.5, -1.27]]))
    >>> step.right_inverse(torch.tensor([[0.5, -1.27]]))
    tensor([[  50, -127]], dtype=torch.int8)
    >>> step(torch.tensor([[50, -127]], dtype=torch.int8))
    tensor([[ 0.5000, -1.2700]])

    The original cannot be trained: integers have no gradient, and an optimizer must not get them. The right
    inverse also sets the scales. The value has the dtype of the weight.

    Arguments:
        bits: of a number, 2 to 8; each takes one byte.
        scheme, group_size, axis: as of ``fake_quantize``, for the scales.
    """

    guarantee = "within half a step of the assigned value; not trainable"
    cost = "one multiplication per entry"
    reference = "Dettmers et al. 2022 (LLM.int8()), arXiv:2208.07339"
    freezes_original = True
    wide_buffers = False
    storage_dtype = torch.int8

    bits: int = 8
    scheme: Scheme = "per_channel"
    group_size: int | None = None
    axis: int | None = None

    def build(self, weight: Tensor) -> None:
        if not 2 <= self.bits <= 8:
            raise RewriterError(f"quantized_storage stores 2 to 8 bits, not {self.bits}")
        self.largest = 2.0 ** (self.bits - 1) - 1
        self.group(weight, self.scheme, self.axis, self.group_size)
        self.register_buffer("scale", self._scales(weight))
        self.scale: Tensor

    def _scales(self, value: Tensor) -> Tensor:
        scales: Tensor = self.cut(widen(value.detach())).abs().amax(self.dims, keepdim=True) / self.largest
        return scales.clamp_min(1e-6 if value.dtype == torch.float16 else 1e-30).to(value.dtype)

    def forward(self, X: Tensor) -> Tensor:
        scale = widen(self.scale)
        value = self.cut(X).to(scale.dtype) * scale
        return value.reshape(X.shape).to(self.scale.dtype)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the integers nearest to `value`, and set the scales."""
        self.scale.copy_(self._scales(value))
        codes = torch.round(self.cut(widen(value)) / widen(self.scale))
        return codes.clamp(-self.largest, self.largest).reshape(value.shape).to(torch.int8)
