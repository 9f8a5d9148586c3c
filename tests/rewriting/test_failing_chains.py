"""A chain that fails while the model runs: the error is the chain's own, and names the tensor."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from rewriter import rewrite


class Fails(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        if self.training:
            raise ZeroDivisionError("no such thing")
        return X


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_the_error_names_the_tensor_and_its_chain(capture: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    spec = {
        "reparam": 1,
        "rules": [{"name": "r", "select": "1.weight", "chain": ["symmetric", Fails()], "init": "raw"}],
    }
    new = rewrite(model, spec, capture=capture).train()
    with pytest.raises(ZeroDivisionError, match="no such thing") as caught:
        new(torch.randn(2, 3))
    assert caught.value.__notes__ == ["while computing 1.weight: symmetric >> Fails"]
    assert caught.value.__cause__ is None
