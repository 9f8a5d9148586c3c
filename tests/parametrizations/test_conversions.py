"""Models that change their type after they were rewritten: `model.half()`, `model.bfloat16()`, and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, rewrite
from tests.parametrizations.test_catalog_in_specs import ADAPTERS, FACTORS, IN_PLACE, name_of
from tests.parametrizations.test_laws import MEMBERS, Member, title

HALVES = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, id="bfloat16"), pytest.param(torch.float16, id="float16", marks=pytest.mark.slow)],
)
# Their right inverse wants a tensor of the family, which a random one is not.
BUILT_ON_THEIR_OWN = [member for member in MEMBERS if member[0] not in ("gl_plus", "sl", "hurwitz_stable")]


class Product(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def rewritten(member: Member, **rule: Any) -> Any:
    name, shape, arguments = member
    spec = {"reparam": 1, "rules": [{"name": "w", "select": "w", "chain": [{name: arguments}], **rule}]}
    return rewrite(Product(shape), spec)


@HALVES
@pytest.mark.parametrize("member", BUILT_ON_THEIR_OWN, ids=title)
def test_a_model_in_half_precision_gives_the_rounded_values_and_trains(member: Member, dtype: torch.dtype) -> None:
    full = rewritten(member).eval()
    half = copy.deepcopy(full).to(dtype)
    there_and_back = copy.deepcopy(half).float()
    x = torch.randn(member[1])
    ours = half(x.to(dtype))
    assert ours.dtype == half.w.dtype == dtype
    torch.testing.assert_close(ours.float(), full(x), rtol=0.05, atol=0.05)
    half.train()(x.to(dtype)).sum().backward()
    for name, parameter in half.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == dtype, name
    assert torch.equal(bake(half.eval())(x.to(dtype)), half(x.to(dtype)))
    with torch.no_grad():  # on the way there and back, only what is trained is rounded
        for parameter in full.parameters():
            parameter.copy_(parameter.to(dtype))
    assert torch.equal(there_and_back.w, full.w)


@pytest.mark.parametrize("chain", ["orthogonal", "stiefel"])
def test_an_orthogonal_matrix_is_one_again_in_full_precision(chain: str) -> None:
    model = rewritten((chain, (6, 4), {})).half().float()
    torch.testing.assert_close(model.w.mT @ model.w, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chain", ["orthogonal", "stiefel", "spectral_norm"])
def test_a_state_that_was_rounded_elsewhere_is_taken_over(chain: str) -> None:
    model = rewritten((chain, (6, 4), {}))
    rounded = {name: value.bfloat16() for name, value in model.state_dict().items()}
    before = model.eval().w
    model.load_state_dict(rounded, assign=True)
    assert model.w.dtype == torch.bfloat16
    torch.testing.assert_close(model.w.float(), before, rtol=0.05, atol=0.05)
    model.train()(torch.randn(6, 4).bfloat16()).sum().backward()


@HALVES
@pytest.mark.parametrize("step", [*IN_PLACE, *ADAPTERS, *FACTORS], ids=name_of)
def test_masks_adapters_and_factors_follow_the_model(step: dict[str, Any], dtype: torch.dtype) -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    spec = {"reparam": 1, "rules": [{"name": "all", "select": "*.weight", "chain": [step]}]}
    full = rewrite(plain, spec)
    half, x = copy.deepcopy(full).to(dtype), torch.randn(3, 6)
    ours = half(x.to(dtype))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), full(x), rtol=0.1, atol=0.1)
    assert torch.equal(bake(half)(x.to(dtype)), ours)
