"""Networks as people build them: blocks, critics, vocoders, convolutions over time, transformers, residual networks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """The input plus what the layers make of it.

    Arguments:
        layers: in order; their output has the input's shape.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return x + self.body(x)


class Causal(nn.Module):
    """A dilated convolution over time that sees no later input.

    Arguments:
        width: channels in and out.
        dilation: steps between the three inputs of an output.
    """

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.conv = nn.Conv1d(width, width, 3, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Return as many steps as `x` has."""
        return self.conv(F.pad(x, (self.padding, 0)))


class Attention(nn.Module):
    """Self-attention with four linear layers and heads of 16 channels.

    Arguments:
        width: channels in and out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return attention over `x` of shape (batch, length, width)."""
        heads = [layer(x).unflatten(-1, (-1, 16)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def mlp(width: int) -> nn.Module:
    """Return six residual blocks of two linear layers."""
    return nn.Sequential(
        *(Residual(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(6)),
    )


def critic(width: int) -> nn.Module:
    """Return seven convolutions over images of 32×32, as in a GAN with spectral norm."""
    sizes = [(3, width, 3, 1), (width, width, 4, 2)]
    for _ in range(2):
        sizes += [(width, 2 * width, 3, 1), (2 * width, 2 * width, 4, 2)]
        width *= 2
    sizes += [(width, 2 * width, 3, 1)]
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in sizes:
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 1))


def vocoder(width: int) -> nn.Module:
    """Return a generator of waveforms with four upsamplings and 72 convolutions between them."""
    layers: list[nn.Module] = [nn.Conv1d(20, width, 7, padding=3)]
    for _ in range(4):
        layers += [nn.LeakyReLU(0.1), nn.ConvTranspose1d(width, width // 2, 4, stride=2, padding=1)]
        width //= 2
        layers += [block for kernel in (3, 5, 7) for block in _dilated(width, kernel)]
    return nn.Sequential(*layers, nn.LeakyReLU(0.1), nn.Conv1d(width, 1, 7, padding=3), nn.Tanh())


def _dilated(width: int, kernel: int) -> Iterator[nn.Module]:
    for dilation in (1, 3, 5):
        yield Residual(
            nn.LeakyReLU(0.1),
            nn.Conv1d(width, width, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2),
            nn.LeakyReLU(0.1),
            nn.Conv1d(width, width, kernel, padding=(kernel - 1) // 2),
        )


def tcn(width: int) -> nn.Module:
    """Return 16 causal convolutions in eight residual blocks, with dilations from 1 to 128."""
    return nn.Sequential(
        *(Residual(Causal(width, 2**i), nn.ReLU(), Causal(width, 2**i), nn.ReLU()) for i in range(8)),
    )


def transformer(width: int) -> nn.Module:
    """Return four transformer blocks, norms first."""
    return nn.Sequential(
        *(
            nn.Sequential(
                Residual(nn.LayerNorm(width), Attention(width)),
                Residual(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
            )
            for _ in range(4)
        )
    )


def resnet(width: int) -> nn.Module:
    """Return eight convolutions in four residual blocks with group norms, over images of 32×32."""
    blocks = [
        Residual(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(4, width),
        )
        for _ in range(4)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Standardise(nn.Module):
    """Weight standardisation: each output channel has mean 0 and variance 1 over its inputs (arXiv:1903.10520).

    Arguments:
        weight: not used.
    """

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()

    def forward(self, X: Tensor) -> Tensor:
        """Return the standardised weight."""
        deviation, mean = torch.std_mean(X.flatten(1), dim=1)
        shape = (-1,) + (1,) * (X.ndim - 1)
        return (X - mean.view(shape)) / (deviation.view(shape) + 1e-5)


RANK = 8
"""Of the changes that `LowRank` trains."""


class LowRank(nn.Module):
    """LoRA: the weight plus a trained change of low rank (arXiv:2106.09685).

    Arguments:
        weight: the weight, for its shape.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(RANK, weight.size(1), device=weight.device) / weight.size(1) ** 0.5)
        self.B = nn.Parameter(torch.zeros(weight.size(0), RANK, device=weight.device))

    def forward(self, X: Tensor) -> Tensor:
        """Return the weight for a frozen one."""
        return X + self.B @ self.A
