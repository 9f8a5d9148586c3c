"""The graph of an nn.Sequential: its layers are found by their place, as before."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from rewriter import bake, rewrite
from rewriter.bindings import _graph_module
from rewriter.errors import RewriterError


def rewritten(count: int = 3, **rule: Any) -> Any:
    rules = [{"name": "w", "select": "*.weight", "chain": ["orthogonal"], **rule}]
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))
    return rewrite(layers, {"reparam": 1, "rules": rules}, capture="graph")


@pytest.mark.parametrize("carry", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(("count", "batch"), [(3, "never"), (3, "always"), (30, "auto")])
def test_layers_by_place(carry: Any, count: int, batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_graph_module, "WRITTEN_AT_ONCE", 40)  # the code of the largest is written when it is called
    model = carry(rewritten(count, batch=batch))
    assert model
    assert len(model) == count
    assert [*model] == [model.get_submodule(str(index)) for index in range(count)]
    assert model[0] is model.get_submodule("0")
    assert model[-1] is [*model][-1]
    torch.testing.assert_close(model[1].weight @ model[1].weight.T, torch.eye(4))
    with pytest.raises(IndexError, match=f"layer {count} of {count}"):
        model[count]
    x = torch.randn(2, 4)
    assert type(model[:]) is nn.Sequential
    torch.testing.assert_close(model[1:](model[:1](x)), model(x))


def test_a_layer_is_replaced_by_place() -> None:
    model: Any = rewrite(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["orthogonal"]}]},
    )
    x = torch.randn(2, 4)
    model[1] = nn.Identity()
    torch.testing.assert_close(model(x), model[0](x))
    model[-2] = nn.Linear(4, 4)
    with pytest.raises(RewriterError, match="0 was replaced"):
        model(x)
    assert type(bake(model)[0]) is nn.Linear  # type: ignore[index]


def test_other_models_have_no_places() -> None:
    rule = {"name": "w", "select": "weight", "chain": ["orthogonal"]}
    model: Any = rewrite(nn.Linear(4, 4), {"reparam": 1, "rules": [rule]}, capture="graph")
    assert model
    with pytest.raises(TypeError):
        model[0]
