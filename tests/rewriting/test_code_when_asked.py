"""The code of a big rewritten model's graph is written when somebody asks for it, and everybody finds it."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import rewrite
from rewriter.runtime import _graph_module
from tests.threads import run_threads

SPEC = {"reparam": 1, "rules": [{"name": "weights", "select": "**.weight", "chain": ["symmetric"]}]}


@pytest.fixture(autouse=True)
def every_graph_is_big(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_graph_module, "WRITTEN_AT_ONCE", 0)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + 1


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return rewrite(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), SPEC)


def expected(x: Tensor) -> Tensor:
    weights = [fresh().get_submodule(f"{index}.parametrizations.weight") for index in (0, 2)]
    first, second = (weight() for weight in weights)
    biases = [fresh().get_parameter(f"{index}.bias") for index in (0, 2)]
    return torch.relu(x @ first.T + biases[0]) @ second.T + biases[1]


ASKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "call": lambda model: model,
    "forward": lambda model: model.forward,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "symbolic_trace": fx.symbolic_trace,
    "compile": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "export": lambda model: torch.export.export(model, (torch.ones(2, 3),)).module(),
    "jit.trace": lambda model: torch.jit.trace(model, torch.ones(2, 3)),
    "jit.script": torch.jit.script,
    "recompile": lambda model: (model.recompile(), model)[1],
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_the_first_to_ask_finds_the_code(ask: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.randn(2, 3)
    assert torch.allclose(ask(fresh())(x), expected(x), atol=1e-6)


@pytest.mark.parametrize("how", ["compile", "export"])
def test_inside_another_model(how: str) -> None:
    x = torch.randn(2, 3)
    assert torch.allclose(ASKS[how](Outer(fresh()))(x), expected(x) + 1, atol=1e-6)


def test_code_and_signature_are_the_graphs() -> None:
    assert "symmetric" not in fresh().code and "parametrizations.weight" in fresh().code
    assert list(inspect.signature(fresh().forward).parameters) == ["input"]


def test_equal_graphs_share_a_class_once_written() -> None:
    one, other = fresh(), fresh()
    one(torch.ones(2, 3)), other(torch.ones(2, 3))
    assert type(one) is type(other)


def test_equal_small_models_share_a_class_before_anybody_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    models = [fresh() for _ in range(3)]
    assert len(set(map(type, models))) == 1
    parameters, _ = torch.func.stack_module_state(models)
    assert parameters["0.parametrizations.weight.original"].shape == (3, 3, 3)


def test_several_threads_may_be_the_first() -> None:
    model, x, found = fresh(), torch.randn(2, 3), []
    run_threads(*[lambda: found.append(model(x))] * 8)
    assert len(found) == 8 and all(torch.allclose(value, expected(x), atol=1e-6) for value in found)
