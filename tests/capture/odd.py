"""A model with any tensors, and a spec, for tests of tensors that are not an ordinary Parameter."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

CAPTURES = pytest.mark.parametrize("capture", ["auto", "module"])


class Doubled(nn.Module):
    """Twice the stored tensor: exact, whatever the dtype."""

    def forward(self, X: Tensor) -> Tensor:
        return X + X

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / 2 if value.is_floating_point() or value.is_complex() else value // 2


def spec(select: Any, *chain: Any, **options: Any) -> dict[str, Any]:
    rule = {"name": "rule", "select": select, "chain": list(chain) or [Doubled()], **options}
    return {"reparam": 1, "rules": [rule]}


class Product(nn.Module):
    """An input times whatever tensors it was given."""

    def __init__(self, **tensors: Any) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.w.dtype) @ self.w
