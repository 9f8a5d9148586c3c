"""A plan is a value: rewrite executes it, and makes it again where the model is not the planned one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import PlanError, RewriterError, absorb, bake, plan, rewrite
from rewriter.planning import _module_table, _prepare
from tests.rules import one_rule


class Branching(nn.Sequential):
    """torch.fx cannot trace it."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if x.sum() < 1e9 else x


def two(kind: Callable[..., nn.Module] = nn.Sequential) -> Any:
    torch.manual_seed(0)
    return kind(nn.Linear(3, 3), nn.Linear(3, 3)).double()


KINDS = pytest.mark.parametrize("kind", [nn.Sequential, Branching])
CHAIN = [{"orthogonal": {"map": "cayley"}}, "spectral_norm"]


@KINDS
def test_a_plan_executed_twice_gives_two_models(kind: Any) -> None:
    model, x = two(kind), torch.randn(2, 3).double()
    made = plan(model, one_rule(*CHAIN))
    one, other = rewrite(model, made), rewrite(model, made)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(one(x), other(x))
    with torch.no_grad():
        for tensor in (*one.parameters(), *one.buffers()):
            tensor.fill_(0.5)
    tensors = [{id(tensor) for tensor in (*m.parameters(), *m.buffers())} for m in (one, other, model)]
    assert not tensors[0] & tensors[1] | tensors[0] & tensors[2] | tensors[1] & tensors[2]
    torch.testing.assert_close(rewrite(model, made).eval()(x), other.eval()(x), rtol=1e-3, atol=1e-3)


@KINDS
def test_a_plan_gives_what_its_spec_gives(kind: Any) -> None:
    model = two(kind)
    torch.manual_seed(1)
    made = plan(model, one_rule(*CHAIN))
    by_plan = rewrite(model, made)
    torch.manual_seed(1)
    by_spec = rewrite(model, one_rule(*CHAIN))
    torch.testing.assert_close(by_plan.state_dict(), by_spec.state_dict(), rtol=0, atol=0)
    assert type(by_plan).__name__ == type(by_spec).__name__
    assert type(bake(by_plan)) is kind


@KINDS
def test_a_plan_executed_in_place_keeps_the_parameters(kind: Any) -> None:
    model = two(kind)
    parameters = set(map(id, model.parameters()))
    made = plan(model, one_rule("symmetric"))
    new = rewrite(model, made, inplace=True)
    assert set(map(id, new.parameters())) == parameters
    again = rewrite(new, made)
    assert list(again.state_dict()) == list(new.state_dict())


def test_a_plan_of_a_rewritten_model_adds_its_sites() -> None:
    model, x = two(), torch.randn(2, 3).double()
    first = rewrite(model, one_rule("weight_norm", select="0.weight"))
    made = plan(first, one_rule("weight_norm", select="1.weight"))
    new = rewrite(first, made)
    assert "1.parametrizations.weight.original0" in new.state_dict()
    assert "1.parametrizations.weight.original0" not in first.state_dict()
    torch.testing.assert_close(new(x), model(x))


def test_a_plan_absorbs_what_its_spec_absorbs() -> None:
    model, x = two(), torch.randn(2, 3).double()
    nn.utils.parametrizations.weight_norm(model[0])
    made = plan(model, {**one_rule("symmetric", select="1.weight"), "absorb": True})
    assert [site.rule for site in made] == ["absorbed:torch.parametrize", "r"]
    one, other = rewrite(model, made), rewrite(model, made)
    assert torch.equal(one(x), other(x))
    assert nn.utils.parametrize.is_parametrized(model[0])
    parameters = {id(p) for p in model.parameters()}
    assert {id(p) for p in rewrite(model, made, inplace=True).parameters()} == parameters


def test_a_plan_for_an_equal_model_is_made_again() -> None:
    model = two()
    made = plan(model, one_rule("symmetric"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.fill_(2.0)
    new: Any = rewrite(other, made)
    assert torch.equal(new.get_submodule("0").weight, other[0].weight)


def wider(model: Any) -> None:
    model.append(nn.Linear(3, 3).double())


def shorter(model: Any) -> None:
    del model[1]


@pytest.mark.parametrize(("change", "text"), [(wider, "2.weight was no site and would be"), (shorter, "1.weight was")])
def test_a_plan_with_other_sites_now_is_refused(change: Any, text: str) -> None:
    model = two()
    made = plan(model, one_rule("symmetric"))
    change(model)
    before = copy.deepcopy(model)
    with pytest.raises(PlanError, match=rf"no longer fits \(.* (has changed|is gone)\): {text}"):
        rewrite(model, made, inplace=True)
    assert str(model) == str(before)
    torch.testing.assert_close(model.state_dict(), before.state_dict())
    with pytest.raises(PlanError, match=r"it was made for another model"):
        rewrite(nn.Sequential(nn.Linear(3, 3), *(nn.Linear(3, 3) for _ in range(3))), made)


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3).double()
        self.tau = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) / self.tau


def _write(model: Any) -> None:
    with torch.no_grad():
        model.fc.weight.mul_(2)


def _swap(model: Any) -> None:
    model.fc.weight.data = model.fc.weight.data * 2


def _tau(model: Any) -> None:
    model.tau = 0.5


def _hook(model: Any) -> None:
    model.fc.register_forward_hook(lambda module, args, output: 2 * output)


def _mode(model: Any) -> None:
    model.fc = nn.Sequential(model.fc, nn.Linear(3, 3).double())[0]
    model.eval()


@pytest.mark.parametrize("change", [_write, _swap, _tau, _hook, _mode])
def test_a_change_between_plan_and_rewrite_counts(change: Callable[[Any], None]) -> None:
    model, x = Tempered(), torch.randn(2, 3).double()
    made = plan(model, one_rule("weight_norm", select="fc.weight"))
    change(model)
    torch.testing.assert_close(rewrite(model, made)(x), model(x))


def test_a_plan_has_its_capture() -> None:
    model = two()
    made = plan(model, one_rule("symmetric"), capture="module")
    assert type(rewrite(model, made)).__name__ == "Sequential"
    with pytest.raises(RewriterError, match=r"give them to rewriter\.plan"):
        rewrite(model, made, capture="graph")


def test_a_plan_of_a_program_is_executed() -> None:
    model, x = two(), torch.randn(2, 3).double()
    program = torch.export.export(model, (x,))
    made = plan(program, one_rule("symmetric"))
    one, other = rewrite(program, made), rewrite(program, made)
    torch.testing.assert_close(one.module()(x), rewrite(model, one_rule("symmetric"))(x))
    tensors = [{id(tensor) for tensor in p.state_dict.values()} for p in (one, other, program)]
    assert not tensors[0] & tensors[1] | tensors[0] & tensors[2] | tensors[1] & tensors[2]
    wide = torch.export.export(nn.Sequential(*model, *two()), (x,))
    with pytest.raises(PlanError, match="made for another model"):
        rewrite(wide, made)


@pytest.mark.parametrize("verb", [rewrite, lambda model, rules: rewrite(model, plan(model, rules))])
def test_everything_is_decided_once(verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for place, name in (
        (_prepare, "_build_all"),
        (_prepare, "_proven"),
        (_module_table, "survey"),
        (_module_table, "capture"),
    ):
        real: Any = getattr(place, name)

        def counted(*args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(place, name, counted)
    verb(two(), one_rule("symmetric"))
    assert sorted(calls) == ["_build_all", "_proven", "capture", "survey"]


class Replicas(nn.DataParallel):
    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


class Distributed(nn.parallel.DistributedDataParallel):
    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize("wrapper", [Replicas, Distributed])
@pytest.mark.parametrize(
    "verb", [lambda m: rewrite(m, one_rule("symmetric")), lambda m: plan(m, one_rule("symmetric")), bake, absorb]
)
def test_a_wrapped_model_is_refused(wrapper: Any, verb: Any) -> None:
    with pytest.raises(RewriterError, match=r"use its attribute \.module"):
        verb(wrapper(two()))


def test_running_statistics_of_several_norms_are_one_diagnostic() -> None:
    norms = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(2)))
    with pytest.raises(PlanError, match=r"0.running_var, 1.running_var are running statistics.*updates them in place"):
        plan(norms, one_rule("identity", select="*.running_var"))


@pytest.mark.parametrize(
    ("select", "expected"),
    [("fc1", "`fc1` is a module: `fc1.weight`, or `fc1.*`"), ("body", "`body.0.weight`, or `body.**`")],
)
def test_the_path_of_a_module_gets_a_hint(select: str, expected: str) -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(2, 2), "body": nn.Sequential(nn.Linear(2, 2))})
    with pytest.raises(PlanError) as caught:
        plan(model, one_rule("symmetric", select=select))
    assert expected in str(caught.value)
