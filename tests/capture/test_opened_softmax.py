"""The adaptive softmax as a function of its head and clusters: its output type, its checks, and its other methods."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rewriter import bake, plan, rewrite


class Flipped(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X / 2 + X.flip(0) / 4


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 8)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(8, 9, [2, 4, 7], **{"div_value": 2, **options})

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.softmax(self.fc(x), target)


class LogProb(Model):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.softmax.log_prob(self.fc(x))


class Predict(Model):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.softmax.predict(self.fc(x))


SPEC = {
    "reparam": 1,
    "rules": [{"name": "r", "select": "softmax.**.weight", "chain": [Flipped()], "init": "raw"}],
}
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
TARGETS = {
    "all": [0, 1, 3, 5, 7, 8],
    "head only": [0, 1, 0, 1, 1, 0],
    "last cluster only": [8, 7, 8, 8, 7, 8],
    "one": [4],
}


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    model = model.double()
    reference = copy.deepcopy(model)
    for site in plan(model, SPEC):
        path, _, tensor = site.name.rpartition(".")
        parametrize.register_parametrization(reference.get_submodule(path), tensor, Flipped())
    return rewrite(model, SPEC), reference


def gradients(model: nn.Module, *args: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output, loss = model(*args)
    (output.sum() / 3 + loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head_bias", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_outputs_and_gradients_are_those_of_torch(name: str, head_bias: bool) -> None:
    new, reference = pair(Model(head_bias=head_bias))
    target = torch.tensor(TARGETS[name])
    x = X[: len(target)]
    found, expected = new(x, target), reference(x, target)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(new, x, target), gradients(reference, x, target), rtol=1e-10, atol=1e-10)


def test_an_input_without_a_batch() -> None:
    new, reference = pair(Model())
    found, expected = new(X[0], torch.tensor(5)), reference(X[0], torch.tensor(5))
    assert found.output.shape == expected.output.shape == ()
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("rows", "target"), [(6, [0, 1, 2, 3, 4, 9]), (6, [-1] * 6), (5, [0] * 6), (6, [[0] * 6]), (6, 0)]
)
def test_what_torch_refuses_is_refused_in_its_words(rows: int, target: Any) -> None:
    new, reference = pair(Model())
    with pytest.raises(RuntimeError) as expected:
        reference(X[:rows], torch.tensor(target))
    with pytest.raises(RuntimeError) as found:
        new(X[:rows], torch.tensor(target))
    assert str(found.value) == str(expected.value)


def test_it_scripts_although_the_plain_module_does_not() -> None:
    new, _ = pair(Model())
    target = torch.tensor(TARGETS["all"])
    torch.testing.assert_close(tuple(torch.jit.script(new)(X, target)), tuple(new(X, target)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", ["softmax", "softmax.head", "softmax.tail.1", "softmax.tail.1.0"])
def test_hooks_keep_it_one_call_and_fire(part: str) -> None:
    model = Model()
    seen: list[str] = []
    model.get_submodule(part).register_forward_hook(lambda m, args, out: seen.append(part))
    new, reference = pair(model)
    assert {site.capture for site in plan(model, SPEC)} == {"handed"}
    target = torch.tensor(TARGETS["all"])
    seen.clear()
    found = gradients(new, X, target)
    assert seen == [part]
    torch.testing.assert_close(found, gradients(reference, X, target), rtol=1e-10, atol=1e-10)


def test_clusters_that_were_replaced_keep_it_one_call() -> None:
    model = Model()
    model.softmax.tail[1][1] = nn.Linear(2, 3, bias=True)
    new, reference = pair(model)
    assert {site.capture for site in plan(model, SPEC)} == {"handed"}
    target = torch.tensor(TARGETS["all"])
    torch.testing.assert_close(gradients(new, X, target), gradients(reference, X, target), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("capture", ["auto", "module"])
@pytest.mark.parametrize("kind", [LogProb, Predict])
def test_its_other_methods_read_computed_tensors(kind: type[Model], capture: str) -> None:
    model = kind().double()
    _, reference = pair(copy.deepcopy(model))
    new = rewrite(model, SPEC, capture=capture)
    torch.testing.assert_close(new(X), reference(X), rtol=1e-10, atol=1e-10)
    assert type(bake(new)) is kind


def test_its_methods_on_the_rewritten_module_itself() -> None:
    new, reference = pair(Model())
    torch.testing.assert_close(new.softmax.log_prob(new.fc(X)), reference.softmax.log_prob(reference.fc(X)))
    assert torch.equal(new.softmax.predict(new.fc(X)), reference.softmax.predict(reference.fc(X)))
    kept = rewrite(Model().double(), SPEC, capture="module")
    target = torch.tensor(TARGETS["all"])
    assert kept(X, target).loss.shape == ()
    assert kept.softmax.predict(kept.fc(X)).shape == (6,)


def test_copies_and_pickles_and_bake() -> None:
    new, reference = pair(Model())
    target = torch.tensor(TARGETS["all"])
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), bake(new)):
        torch.testing.assert_close(tuple(other(X, target)), tuple(reference(X, target)), rtol=1e-10, atol=1e-10)
    plain = Model()
    assert [type(module) for module in bake(new).modules()] == [type(module) for module in plain.modules()]
    assert list(bake(new).state_dict()) == list(plain.state_dict())
