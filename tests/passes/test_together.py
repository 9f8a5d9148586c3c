"""Steps of classes that evaluate several tensors of any shapes together: nothing but the speed changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewriter import rewrite
from rewriter.parametrizations import WeightNorm
from rewriter.sites._batch import BatchedEvaluation

STEPS = ["weight_norm", "spectral_norm"]


class Net(nn.Module):
    """Two outputs, from layers of four kinds and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.conv = nn.Linear(6, 8), nn.Conv1d(2, 4, 3, padding=1)
        self.up, self.last = nn.ConvTranspose1d(4, 2, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.wide(x))
        return self.last(hidden), self.up(torch.tanh(self.conv(hidden.unflatten(1, (2, 4)))))


Pair = tuple[nn.Module, nn.Module]


def _pair(step: Any) -> Pair:
    """Return the network with its weights evaluated together, and one after the other."""
    model, init = Net().double(), "raw" if isinstance(step, nn.Module) else "keep"
    made = []
    for batch in ("always", "never"):
        rule = {"name": "rule", "select": "*.weight", "chain": [step], "batch": batch, "init": init}
        torch.manual_seed(1)
        made.append(rewrite(model, {"reparam": 1, "rules": [rule]}))
    return made[0], made[1]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each run of a node of several sites, whether it gave values."""
    found: list[bool] = []
    original = BatchedEvaluation.forward

    def noted(self: BatchedEvaluation) -> Any:
        values = original(self)
        found.append(values is not None)
        return values

    monkeypatch.setattr(BatchedEvaluation, "forward", noted)
    return found


def _x() -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64)


def _same(pair: Pair, x: Tensor, run: Any = lambda model, x: model(x)) -> None:
    """Run both, and compare outputs, gradients and state."""
    outputs = []
    for model in pair:
        model.zero_grad()
        outputs.append(run(model, x))
        if torch.is_grad_enabled():
            sum(out.square().sum() for out in outputs[-1]).backward()
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    for one, other in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pair[0].state_dict(), pair[1].state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", [*STEPS, {"spectral_norm": {"n_power_iterations": 3}}], ids=str)
def test_values_gradients_and_state_are_those_of_one_after_the_other(step: Any, given: list[bool]) -> None:
    pair = _pair(step)
    for _ in range(2):
        _same(pair, _x())
    assert given == [True, True]
    for model in pair:
        model.eval()
    _same(pair, _x())


@pytest.mark.parametrize("step", STEPS)
def test_second_derivatives_are_those_of_one_after_the_other(step: str, given: list[bool]) -> None:
    x, found = _x(), []
    for model in _pair(step):
        trained = list(model.parameters())
        loss = sum(out.pow(3).sum() for out in model(x))
        first = torch.autograd.grad(loss, trained, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), trained))
    assert given == [True]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", STEPS)
def test_a_gradient_for_each_of_several_losses(step: str) -> None:
    x, found, losses = _x(), [], torch.eye(3, dtype=torch.float64)
    for model in _pair(step):
        trained = [*model.wide.parameters(), *model.last.parameters()]  # type: ignore[union-attr]
        out = model(x)[0].sum(0)
        found.append(torch.autograd.grad(out, trained, losses, is_grads_batched=True))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", STEPS)
def test_a_member_without_gradient_gets_none(step: str, given: list[bool]) -> None:
    x = _x()
    for model in _pair(step):
        model(x)[0].sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == name.startswith(("conv", "up"))
    assert given == [True]


@pytest.mark.parametrize("step", STEPS)
def test_a_member_that_is_not_trained_needs_no_gradient(step: str, given: list[bool]) -> None:
    pair, seen = _pair(step), []
    for model in pair:
        for parameter in model.wide.parameters():  # type: ignore[union-attr]
            parameter.requires_grad_(False)
        model.wide.parametrizations.weight.register_forward_hook(  # type: ignore[union-attr]
            lambda _, __, value: seen.append(value.requires_grad)
        )
    _same(pair, _x())
    assert (seen, given) == ([False, False], [True])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("step", STEPS)
def test_a_checkpointed_forward_is_replayed_with_its_state(step: str, reentrant: bool) -> None:
    def run(model: nn.Module, x: Tensor) -> Any:
        return checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)

    pair = _pair(step)
    for _ in range(2):
        _same(pair, _x(), run)


@pytest.mark.parametrize("step", STEPS)
def test_without_gradients_the_state_advances_as_alone(step: str) -> None:
    with torch.no_grad():
        _same(_pair(step), _x())


def _hooked(model: Any) -> None:
    model.get_submodule("conv.parametrizations.weight.0").register_forward_hook(lambda _, __, value: 2 * value)


def _eval(model: Any) -> None:
    model.get_submodule("conv.parametrizations.weight.0").eval()


def _zero(model: Any) -> None:
    with torch.no_grad():
        list(model.conv.parametrizations.weight.parameters())[-1].zero_()


def _moved(model: Any) -> None:
    weight = model.wide.parametrizations.weight
    name = weight.original_names[-1]
    setattr(weight, name, nn.Parameter(getattr(weight, name).detach().t().contiguous().t()))


def _replaced(model: Any) -> None:
    weight = model.wide.parametrizations.weight
    name = weight.original_names[-1]
    setattr(weight, name, nn.Parameter(2 * getattr(weight, name).detach()))


@pytest.mark.parametrize("change", [_hooked, _eval, _zero, _moved, _replaced], ids=lambda change: change.__name__)
@pytest.mark.parametrize("step", STEPS)
def test_a_late_change_of_one_member_counts(step: str, change: Any) -> None:
    pair = _pair(step)
    _same(pair, _x())
    for model in pair:
        change(model)
    _same(pair, _x())


class _Twice(WeightNorm):
    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return 2 * super().forward(g, v)


def test_a_subclass_with_another_forward_is_not_evaluated_together() -> None:
    rule = {"name": "rule", "select": "*.weight", "chain": [_Twice()], "init": "keep"}
    model = rewrite(Net().double(), {"reparam": 1, "rules": [rule]})
    assert not any(isinstance(module, BatchedEvaluation) for module in model.modules())


def test_copies_evaluate_their_own_tensors_together(given: list[bool]) -> None:
    new, x = _pair("spectral_norm")[0], _x()
    new(x)
    clone = copy.deepcopy(new)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(0.5)
    reference = copy.deepcopy(clone)
    torch.testing.assert_close(clone(x), reference(x))
    assert given == [True] * 3
