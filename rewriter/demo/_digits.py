"""The handwritten digits of scikit-learn: 1,797 images of 8×8 pixels, bundled with the package."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import RewriterError

_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Digits:
    """Images as rows of 64 pixels in [0, 1] with their digits, for training and for testing."""

    images: Tensor
    digits: Tensor
    test_images: Tensor
    test_digits: Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a random batch of the training images."""
        index = torch.randint(len(self.images), (size,), generator=generator)
        return self.images[index], self.digits[index]


def load_digits(seed: int) -> Digits:
    """Load the digits and split them at random; equal seeds give equal splits.

    Raises:
        RewriterError: scikit-learn is not installed.
    """
    try:
        datasets: Any = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise RewriterError("the demo needs scikit-learn: pip install 'reparam[demo]'") from None
    bunch = datasets.load_digits()
    images = torch.tensor(bunch.data / 16.0, dtype=torch.float32)
    digits = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cut = int(len(images) * (1 - _TEST_SHARE))
    train, test = order[:cut], order[cut:]
    return Digits(images[train], digits[train], images[test], digits[test])
