"""The network of the demo, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor, nn


class PixelRNN(nn.Module):
    """Read an image pixel by pixel and classify the digit.

    Arguments:
        pixels: number of pixels of an image, which is the number of time steps.
        hidden: size of the hidden state.
        classes: number of digits.
    """

    def __init__(self, pixels: int = 64, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.pixels = pixels
        self.hidden = hidden
        self.cell = nn.RNNCell(1, hidden, nonlinearity="relu")
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, classes), of images given as (batch, pixels)."""
        state = images.new_zeros(images.shape[0], self.hidden)
        for pixel in range(self.pixels):
            state = self.cell(images[:, pixel : pixel + 1], state)
        logits: Tensor = self.head(state)
        return logits
