"""A rewriting that fails leaves the model as it was, also where it was to be rewritten in place."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import PlanError, RewriterError, plan, rewrite
from tests.rules import one_rule


class Tied(nn.Module):
    """A recurrent layer and two tied linear ones: owners of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("gain", torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.layer(x)[0])) @ self.gain


class SaysTooMuch(nn.Module):
    """Says that it merges with its like, and that it is for several tensors at once: neither is so."""

    batched = True

    def forward(self, X: Tensor) -> Tensor:
        return X / (1 + X.norm())

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / 2

    def fuse(self, next: nn.Module) -> nn.Module | None:
        return self if type(next) is SaysTooMuch else None


_spec = functools.partial(one_rule, select=["**.weight*", "gain"])


def _unchanged(model: nn.Module) -> Callable[[], None]:
    classes = [(path, type(module)) for path, module in model.named_modules()]
    tensors = [
        (name, tensor, tensor.clone(), tensor.requires_grad)
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]
    x = torch.randn(3, 2, 4)
    value = model(x)

    def check() -> None:
        assert [(path, type(module)) for path, module in model.named_modules()] == classes
        now = model.state_dict(keep_vars=True)
        assert list(now) == [name for name, *_ in tensors]
        for name, tensor, content, trained in tensors:
            assert now[name] is tensor and tensor.requires_grad is trained
            torch.testing.assert_close(tensor, content, rtol=0, atol=0)
        assert model.second.weight is model.first.weight
        assert not any("_reparam_contexts" in vars(module) for module in model.modules())
        torch.testing.assert_close(model(x), value, rtol=0, atol=0)
        value_of_a_copy = copy.deepcopy(model)(x)
        torch.testing.assert_close(value_of_a_copy, value, rtol=0, atol=0)

    return check


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (_spec(SaysTooMuch(), SaysTooMuch()), "steps 1–2 of SaysTooMuch >> SaysTooMuch give another value as one"),
        (_spec(SaysTooMuch(), batch="always"), "`batch: always` is not possible: the chain gives other values"),
    ],
    ids=["fuse", "batch"],
)
def test_what_a_step_says_wrongly_is_a_problem_of_the_plan(spec: dict[str, Any], message: str) -> None:
    model = Tied()
    check = _unchanged(model)
    for refuse in (plan, rewrite, lambda model, spec: rewrite(model, spec, inplace=True)):
        with pytest.raises(PlanError, match=message) as found:
            refuse(model, spec)
        assert [problem.path for problem in found.value.diagnostics] in (["rules[0].chain"], ["rules[0].batch"])
        check()


@pytest.mark.parametrize("inplace", [False, True])
def test_what_breaks_on_the_way_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capture: str, inplace: bool
) -> None:
    model = Tied()
    check = _unchanged(model)

    def broken(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "rewriter._rewrite.lowered_model" if capture == "graph" else "rewriter._rewrite.open_path", broken
    )
    with pytest.raises(KeyboardInterrupt):
        rewrite(model, _spec({"orthogonal": {"map": "cayley"}}), capture=capture, inplace=inplace)
    check()
    monkeypatch.undo()
    new = rewrite(model, _spec("symmetric", **{"select": "*.weight"}), capture=capture, inplace=inplace)
    assert "first.parametrizations.weight.original" in new.state_dict()


@pytest.mark.parametrize(
    ("options", "capture", "reason"),
    [
        ({}, "module", "it takes a graph of the model, which is captured as module"),
        ({"select": "first.weight"}, "auto", "no two tensors with equal chains over equal shapes"),
        (
            {"chain": ["spectral_norm", {"scale": {"factor": 2}}]},
            "auto",
            "spectral_norm advances a state or draws random numbers",
        ),
        ({"cache": "version"}, "auto", "`cache: version` decides for each tensor"),
        ({"memory": "recompute"}, "auto", "`memory: recompute` evaluates each tensor again"),
    ],
    ids=["module", "alone", "stateful", "version", "recompute"],
)
def test_a_batch_that_is_asked_for_and_cannot_be_is_refused(options: dict[str, Any], capture: str, reason: str) -> None:
    spec = _spec({"orthogonal": {"map": "cayley"}}, **{"select": "layer.weight*", "batch": "always", **options})
    with pytest.raises(RewriterError, match=reason):
        rewrite(Tied(), spec, capture=capture)
    rewrite(Tied(), spec, capture=capture, without=["batch"])
