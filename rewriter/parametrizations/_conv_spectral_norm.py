"""The operator norm of a convolution, by the power method on feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Precise
from rewriter.parametrizations.maths._eager import overwrite
from rewriter.parametrizations.maths._precision import widen


class ConvSpectralNorm(Precise, name="conv_spectral_norm"):
    """Divide the kernel of a convolution by the norm of the whole operator, not only of the flattened kernel.

    >>> import torch
    >>> kernel = torch.ones(1, 1, 2)
    >>> step = ConvSpectralNorm([64], n_power_iterations=500, weight=kernel)
    >>> torch.allclose(step(kernel), torch.full((1, 1, 2), 0.5), atol=1e-3)
    True

    The norm depends on the size of the input and on how the convolution pads and strides. The buffer ``_v`` is the
    feature map that grows most; it advances once per forward in train mode.

    Arguments:
        input_size: height and width (or as many numbers as the convolution has dimensions) of its input.
        stride, padding, dilation, groups: those of the convolution; padding is by zeros.
        n_power_iterations: steps per forward in train mode.
        eps: the least norm that is divided by.
    """

    guarantee = "the convolution does not lengthen any input, up to the error of the power method"
    cost = "2 n_power_iterations + 1 convolutions of one input"
    reference = "Gouk et al., https://arxiv.org/abs/1804.04368"
    stateful = True

    input_size: Sequence[int]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    n_power_iterations: int = 1
    eps: float = 1e-12

    def build(self, weight: Tensor) -> None:
        dims = weight.ndim - 2
        if dims < 1 or len(self.input_size) != dims:
            raise RewriterError(
                f"conv_spectral_norm: a kernel of shape {list(weight.shape)} does not go with an input of "
                f"size {list(self.input_size)}"
            )
        if self.n_power_iterations <= 0:
            raise RewriterError(
                f"conv_spectral_norm: n_power_iterations must be positive, not {self.n_power_iterations}"
            )
        self.strides, self.pads, self.dilations = [self.stride] * dims, [self.padding] * dims, [self.dilation] * dims
        reach = [
            size + 2 * self.padding - self.dilation * (kernel - 1) - 1
            for size, kernel in zip(self.input_size, weight.shape[2:], strict=True)
        ]
        if min(reach) < 0:
            raise RewriterError(f"conv_spectral_norm: the kernel is larger than an input of {list(self.input_size)}")
        self.remainder = [r % self.stride for r in reach]
        W = widen(weight.detach())
        start = torch.randn(1, weight.size(1) * self.groups, *self.input_size, dtype=W.dtype, device=W.device)
        self.register_buffer("_v", start / torch.linalg.vector_norm(start))
        self._v: Tensor
        self._advance(W, 15)

    def value(self, X: Tensor) -> Tensor:
        if self.training:
            self._advance(X.detach(), self.n_power_iterations)
        v = widen(self._v.clone())
        if not self.training:  # an averaged model has averaged maps
            v = v / torch.linalg.vector_norm(v).clamp_min(self.eps)
        sigma = torch.linalg.vector_norm(self._convolve(X, v))
        return X / torch.where(sigma <= self.eps, torch.ones_like(sigma), sigma)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value` itself, after fitting the feature map to it."""
        self._advance(widen(value.detach()), 100)
        return value

    def _advance(self, W: Tensor, steps: int) -> None:
        with torch.no_grad():
            for _ in range(steps):
                back = self._transposed(W, self._convolve(W, widen(self._v)))
                norm = torch.linalg.vector_norm(back)
                turned = torch.where(norm <= self.eps, self._v, back / norm.clamp_min(self.eps))
                if torch.jit.is_scripting():  # type: ignore[attr-defined]
                    self._v.copy_(turned)
                else:
                    overwrite(self._v, turned)

    def _convolve(self, W: Tensor, x: Tensor) -> Tensor:
        none = [0] * len(self.strides)
        return torch.convolution(x, W, None, self.strides, self.pads, self.dilations, False, none, self.groups)

    def _transposed(self, W: Tensor, y: Tensor) -> Tensor:
        return torch.convolution(
            y, W.conj(), None, self.strides, self.pads, self.dilations, True, self.remainder, self.groups
        )
