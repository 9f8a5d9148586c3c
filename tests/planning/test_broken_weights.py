"""Weights that are no numbers any more: said before one entry spoils a whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import plan, rewrite
from rewriter.errors import PlanError


class Holder(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point() and weight.itemsize > 1)
        self.register_buffer("mask", torch.zeros(3, 3).fill_diagonal_(-torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight + self.mask


def spec(select: str, step: Any, **rule: Any) -> dict[str, Any]:
    return {"reparam": 1, "rules": [{"name": "w", "select": select, "chain": [step], **rule}]}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("verb", [plan, rewrite])
def test_a_weight_with_a_broken_entry_is_refused(verb: Any, dtype: torch.dtype, bad: float) -> None:
    weight = torch.randn(3, 3).to(dtype)
    weight[1, 2] = bad
    with pytest.raises(PlanError, match=r"weight has 1 of \d+ entries that are NaN or infinite.*init: raw"):
        verb(Holder(weight), spec("weight", "orthogonal"))


def test_it_can_be_stored_as_it_is() -> None:
    weight = torch.randn(3, 3)
    weight[1, 2] = torch.nan
    model = rewrite(Holder(weight), spec("weight", "identity", init="raw"))
    assert torch.equal(model.get_parameter("weight").isnan(), weight.isnan())


def test_a_buffer_may_hold_infinities() -> None:
    model: Any = rewrite(Holder(torch.ones(3, 3)), spec("mask", "identity"))
    assert model.mask.isinf().sum() == 3


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool])
def test_types_without_such_entries_or_operators_are_taken_as_they_are(dtype: torch.dtype) -> None:
    model: Any = rewrite(Holder(torch.ones(3, 3).to(dtype)), spec("weight", "identity"), capture="module")
    assert model.weight.dtype == dtype


@pytest.mark.parametrize("shape", [(0, 3), ()])
def test_tensors_without_a_matrix_are_looked_at_too(shape: tuple[int, ...]) -> None:
    model: Any = rewrite(Holder(torch.ones(shape)), spec("weight", "identity"), capture="module")
    assert model.weight.shape == shape
