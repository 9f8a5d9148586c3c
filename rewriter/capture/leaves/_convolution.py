"""Convolutions, padded and transposed ones included."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.capture._leaves import Opened, Own, opens
from rewriter.serialization._functions import graph_function

_TENSORS = (Own("weight"), Own("bias"))


@graph_function
def padded_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad: list[int],
    mode: str,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`torch.nn.Conv1d` with a padding mode other than zeros; `pad` as `torch.nn.functional.pad` takes it."""
    return F.conv1d(F.pad(input, pad, mode=mode), weight, bias, stride, 0, dilation, groups)


@graph_function
def padded_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad: list[int],
    mode: str,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`torch.nn.Conv2d` with a padding mode other than zeros."""
    return F.conv2d(F.pad(input, pad, mode=mode), weight, bias, stride, 0, dilation, groups)


@graph_function
def padded_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad: list[int],
    mode: str,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`torch.nn.Conv3d` with a padding mode other than zeros."""
    return F.conv3d(F.pad(input, pad, mode=mode), weight, bias, stride, 0, dilation, groups)


_CONVOLUTIONS = {
    nn.Conv1d: (F.conv1d, padded_conv1d),
    nn.Conv2d: (F.conv2d, padded_conv2d),
    nn.Conv3d: (F.conv3d, padded_conv3d),
}


@opens(*_CONVOLUTIONS)
def convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Opened:
    plain, padded = next(found for kind, found in _CONVOLUTIONS.items() if isinstance(module, kind))
    if module.padding_mode == "zeros":
        return Opened(plain, (*_TENSORS, module.stride, module.padding, module.dilation, module.groups))
    pad = list(module._reversed_padding_repeated_twice)
    return Opened(padded, (*_TENSORS, pad, module.padding_mode, module.stride, module.dilation, module.groups))


@graph_function
def conv_transpose(
    input: Tensor,
    output_size: list[int] | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    groups: int,
    dilation: list[int],
) -> Tensor:
    """`torch.nn.ConvTranspose1d`, ``2d`` or ``3d``, told apart by the weight (C_in, C_out / groups, *kernel).

    `output_size` names the spatial sizes wanted, or the whole shape; it decides `output_padding`.
    """
    dims = weight.dim() - 2
    extra = output_padding
    if output_size is not None:
        skipped = 2 if input.dim() == dims + 2 else 1
        wanted = output_size[skipped:] if len(output_size) == skipped + dims else output_size
        if len(wanted) != dims:
            raise ValueError(
                f"ConvTranspose{dims}D: for {input.dim()}D input, output_size must have {dims} or {skipped + dims} "
                f"elements (got {len(output_size)})"
            )
        extra = []
        for d in range(dims):
            reach = dilation[d] * (weight.size(d + 2) - 1) + 1
            smallest = (input.size(d + skipped) - 1) * stride[d] - 2 * padding[d] + reach
            if wanted[d] < smallest or wanted[d] > smallest + stride[d] - 1:
                raise ValueError(
                    f"requested an output size of {output_size}, but dimension {d} can be {smallest} to "
                    f"{smallest + stride[d] - 1}"
                )
            extra.append(wanted[d] - smallest)
    if dims == 1:
        return F.conv_transpose1d(input, weight, bias, stride, padding, extra, groups, dilation)
    if dims == 2:
        return F.conv_transpose2d(input, weight, bias, stride, padding, extra, groups, dilation)
    return F.conv_transpose3d(input, weight, bias, stride, padding, extra, groups, dilation)


@opens(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> Opened:
    settings = (module.stride, module.padding, module.output_padding, module.groups, module.dilation)
    return Opened(conv_transpose, (*_TENSORS, *settings))
