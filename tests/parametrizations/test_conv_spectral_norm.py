from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rewriter.errors import RewriterError
from rewriter.parametrizations import ConvSpectralNorm


def operator(kernel: Tensor, size: list[int], stride: int, padding: int, dilation: int) -> Tensor:
    """Return the matrix of a convolution, one column per input entry."""
    inputs = torch.eye(kernel.size(1) * size[0] * size[1], dtype=kernel.dtype)
    outputs = functional.conv2d(inputs.view(-1, kernel.size(1), *size), kernel, None, stride, padding, dilation)
    return outputs.flatten(1).T


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (1, 1, 1), (2, 1, 1), (2, 0, 2), (3, 2, 1)])
def test_conv_spectral_norm_is_the_norm_of_the_operator(stride: int, padding: int, dilation: int) -> None:
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    size = [7, 8]
    step = ConvSpectralNorm(size, stride, padding, dilation, n_power_iterations=300, weight=kernel)
    value = step(kernel)
    norm = torch.linalg.matrix_norm(operator(value, size, stride, padding, dilation), 2).item()
    assert norm == pytest.approx(1, abs=1e-6)


def test_conv_spectral_norm_differentiates_the_norm() -> None:
    kernel = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    step = ConvSpectralNorm([5, 5], 1, 1, n_power_iterations=2000, weight=kernel)
    exact = kernel / torch.linalg.matrix_norm(operator(kernel, [5, 5], 1, 1, 1), 2)
    G = torch.randn_like(kernel)
    grads = [torch.autograd.grad(value, kernel, G)[0] for value in (step(kernel), exact)]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-6)


def test_conv_spectral_norm_refuses_what_is_no_kernel_for_the_input() -> None:
    with pytest.raises(RewriterError, match="does not go with an input of size"):
        ConvSpectralNorm([5, 5], weight=torch.ones(3, 3))
    with pytest.raises(RewriterError, match="larger than an input"):
        ConvSpectralNorm([2, 2], weight=torch.ones(1, 1, 3, 3))
