"""Masks, adapters, factors, quantizers and glue by their names in a spec, through rewrite and bake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rewriter import bake, rewrite
from tests.rules import one_rule

IN_PLACE: list[dict[str, Any]] = [
    {"l1_unstructured": {"amount": 0.5}},
    {"ln_structured": {"amount": 1, "n": "inf", "dim": 0}},
    {"n_m": {"n": 1, "m": 2}},
    {"block_sparse": {"amount": 2, "block_shape": [2, 2]}},
    {"fake_quantize": {"bits": 4, "scheme": "per_group", "group_size": 2}},
    {"binary": {}},
    {"ternary": {"threshold": 0.5}},
    {"detach": {}},
    {"identity": {}},
    {"weight_dropout": {"p": 0.5}},
]
ADAPTERS: list[dict[str, Any]] = [
    {"lora": {"r": 2, "lora_alpha": 4}},
    {"lora": {"r": 2, "init_lora_weights": "pissa"}},
    {"dora": {"r": 2}},
    {"adalora": {"r": 2}},
    {"vera": {"r": 2}},
    {"loha": {"r": 2}},
    {"lokr": {"r": 1, "init_weights": "lycoris"}},
    {"ia3": {}},
    {"hira": {"r": 2}},
    {"delora": {"r": 2}},
    {"oft": {"oft_block_size": 2}},
    {"hra": {"r": 2}},
    {"road": {"group_size": 2, "variant": "road_2"}},
    {"shira": {"r": 1}},
    {"fourierft": {"n_frequency": 3}},
    {"c3a": {"block_size": 2}},
    {"miss": {"r": 2}},
    {"gralora": {"r": 2}},
    {"trainable_tokens": {"token_indices": [0]}},
]
FACTORS: list[dict[str, Any]] = [
    {"low_rank": {"rank": 2}},
    {"fixed_rank": {"rank": 2}},
    {"kronecker": {"factor_shape": [2, 2], "rank": 2}},
]


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


def name_of(step: dict[str, Any]) -> str:
    return next(iter(step))


@pytest.mark.parametrize("step", [*IN_PLACE, *ADAPTERS, *FACTORS], ids=name_of)
def test_bakes_into_a_model_of_the_same_values(step: dict[str, Any]) -> None:
    x, new = torch.randn(3, 6), rewrite(model(), one_rule(step))
    plain = bake(new)
    torch.testing.assert_close(plain(x), new(x))
    assert list(plain.state_dict()) == list(model().state_dict())


@pytest.mark.parametrize("step", ADAPTERS, ids=name_of)
def test_an_adapter_starts_where_the_model_is_and_only_its_parameters_train(step: dict[str, Any]) -> None:
    plain, x = model(), torch.randn(3, 6)
    new = rewrite(plain, one_rule(step))
    torch.testing.assert_close(new(x), plain(x))
    frozen = [name for name, parameter in new.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"{i}.parametrizations.weight.original" for i in (0, 2)]
    optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], lr=0.1)
    before = new(x).detach()
    new(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(new(x), before)


def test_an_adapter_on_a_base_stored_in_int8() -> None:
    plain, x = model(), torch.randn(3, 6)
    new = rewrite(plain, one_rule("quantized_storage", {"lora": {"r": 2}}))
    assert new.state_dict()["0.parametrizations.weight.original"].dtype == torch.int8
    torch.testing.assert_close(new(x), plain(x), rtol=0.05, atol=0.02)
    new(x).sum().backward()
    torch.testing.assert_close(bake(new)(x), new(x))
