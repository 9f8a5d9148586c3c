"""What rewriting does, baking undoes."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import PlanError, bake, rewrite
from rewriter.passes import print_graph

Rule = Callable[..., dict[str, Any]]


def signature(model: nn.Module) -> list[tuple[str, type, bool]]:
    """Names, kinds and training flags of all tensors, in order."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, type(tensor), tensor.requires_grad) for name, tensor in tensors]


def classes(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("inplace", [False, True])
def test_bake_gives_back_the_class_names_order_and_values(case: Any, capture: str, inplace: bool, rule: Rule) -> None:
    model, x, name = case
    expected = copy.deepcopy(model)
    new = rewrite(model, rule(name, "weight_norm"), capture=capture, inplace=inplace)
    y = new(x)
    baked = bake(new, inplace=inplace)
    assert type(baked) is type(expected)
    assert classes(baked) == classes(expected)
    assert signature(baked) == signature(expected)
    assert list(baked.state_dict()) == list(expected.state_dict())
    assert all(tensor.is_contiguous() for tensor in baked.state_dict().values())
    assert not any("reparam" in key for module in baked.modules() for key in vars(module))
    torch.testing.assert_close(baked(x), y)
    assert vars(baked).keys() == vars(expected).keys()


def test_rewriting_leaves_the_model_as_it_was(case: Any, rule: Rule) -> None:
    model, x, name = case
    before, y = copy.deepcopy(model.state_dict()), model(x)
    new = rewrite(model, rule(name, "weight_norm"))
    new(x).sum().backward()
    bake(new)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(model(x), y)
    assert all(p.grad is None for p in model.parameters())


def test_inplace_keeps_the_parameter_objects(case: Any, rule: Rule) -> None:
    model, _, name = case
    objects = set(model.parameters())
    names = dict(model.named_parameters())
    new = rewrite(model, rule(name, "weight_norm"), inplace=True)
    assert sum(p not in objects for p in new.parameters()) == 1  # the norms, which are new
    baked = bake(new, inplace=True)
    assert dict(baked.named_parameters()).keys() == names.keys()
    assert all(p is names[name] for name, p in baked.named_parameters())


def test_ties_stay_ties(make: dict[str, Any], rule: Rule) -> None:
    model = make["TiedLm"]()
    for capture in ("graph", "module"):
        new = rewrite(model, rule("head.weight", "weight_norm"), capture=capture)
        assert new.embed.parametrizations.weight is new.head.parametrizations.weight
        tokens = torch.randint(11, (2, 4))
        torch.testing.assert_close(new(tokens), model(tokens))
        baked = bake(new)
        assert baked.embed.weight is baked.head.weight
        assert isinstance(baked.head.weight, nn.Parameter)


def test_the_graph_of_a_graph_module_comes_back_equal(case: Any, rule: Rule) -> None:
    model, x, name = case
    gm = fx.symbolic_trace(_without_zeros(model))
    for node in gm.graph.nodes:
        node.type = None  # torch.fx keeps annotations that are strings in a form that TorchScript cannot read
    gm.recompile()
    new = rewrite(gm, rule(name, "weight_norm"))
    assert print_graph(new) != print_graph(gm)
    baked = bake(new)
    assert str(baked.graph) == str(gm.graph)
    assert baked.code == gm.code
    assert list(baked.state_dict()) == list(gm.state_dict())
    torch.testing.assert_close(torch.jit.script(baked)(x), new(x))


def _without_zeros(model: nn.Module) -> nn.Module:
    """The unrolled models make their first state in a way that torch.fx alone cannot trace."""
    if not hasattr(model, "cell"):
        return model

    class FromState(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = model.cell, model.head

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(3, 5)
            for t in range(7):
                h = self.cell(x[:, t], h)
            return self.head(h)

    return FromState()


def test_the_unbaked_graph_scripts_when_the_plain_model_does(case: Any, rule: Rule) -> None:
    model, x, name = case
    new = rewrite(model, rule(name, "weight_norm"))
    scripted = torch.jit.script(new)
    torch.testing.assert_close(scripted(x), new(x))
    assert str(new.graph) == str(rewrite(model, rule(name, "weight_norm")).graph), "scripting changed the model"
    torch.testing.assert_close(scripted(x), bake(new)(x))


def test_keep_original_undoes_what_raw_put_on(case: Any, capture: str, rule: Rule) -> None:
    model, x, name = case
    mask = torch.rand(model.get_parameter(name).shape, dtype=torch.float64)

    class Mask(nn.Module):
        def forward(self, X: Tensor) -> Tensor:
            return X * mask

    new = rewrite(model, rule(name, Mask(), init="raw"), capture=capture)
    assert not torch.allclose(new(x), model(x))
    torch.testing.assert_close(bake(new, keep="original")(x), model(x), rtol=0, atol=0)


def test_keep_original_refuses_where_there_is_no_one_original(make: dict[str, Any], rule: Rule) -> None:
    new = rewrite(make["Twice"](), rule("layer.weight", "weight_norm"))
    stored = r"layer\.weight: weight_norm stores float32\[5, 1\], float32\[5, 5\], which.*keep='value'"
    with pytest.raises(PlanError, match=stored):
        bake(new, keep="original")


def test_a_part_is_baked_by_rule_or_by_name(capture: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))
    spec = {
        "reparam": 1,
        "rules": [
            {"name": "first", "select": "0.weight", "chain": ["skew"]},
            {"name": "rest", "select": "{2,3}.weight", "chain": ["symmetric"]},
        ],
    }
    x = torch.randn(2, 4)
    new = rewrite(model, spec, capture=capture)
    part = bake(new, only=["first", "3.**"])
    torch.testing.assert_close(part(x), new(x))
    assert [key for key in part.state_dict() if "parametrizations" in key] == ["2.parametrizations.weight.original"]
    assert type(part.get_submodule("0")) is nn.Linear
    whole = bake(part)
    assert type(whole) is nn.Sequential
    torch.testing.assert_close(whole(x), new(x))
    with pytest.raises(PlanError, match=r"'nothing' is neither a rule or label .* 'first', 'rest'"):
        bake(new, only=["nothing"])


def test_bake_keeps_parameters_under_no_grad_and_inference_mode(make: dict[str, Any], rule: Rule) -> None:
    model = make["Twice"]()
    model.layer.bias.requires_grad_(False)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            new = rewrite(model, rule("layer.*", Half()))
            baked = bake(new)
        assert signature(baked) == signature(model)
        assert not any(p.is_inference() for p in baked.parameters())
        baked(torch.randn(2, 5)).sum().backward()


class Half(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X / 2


def test_rewriting_twice_changes_nothing(case: Any, rule: Rule) -> None:
    model, x, name = case
    spec = rule(name, "weight_norm")
    for capture in ("graph", "module"):
        new = rewrite(model, spec, capture=capture)
        again = rewrite(new, spec)
        assert type(again).__name__ == type(new).__name__
        assert list(again.state_dict()) == list(new.state_dict())
        assert torch.equal(again(x), new(x))
        if capture == "graph":
            assert str(again.graph) == str(new.graph)
        assert rewrite(new, spec, inplace=True) is new


def test_another_plan_on_the_same_site_names_both(make: dict[str, Any], rule: Rule) -> None:
    new = rewrite(make["Twice"](), rule("layer.weight", "weight_norm"))
    with pytest.raises(PlanError, match=r"layer\.weight is already parametrized by rule 'rule' \(weight_norm\).*skew"):
        rewrite(new, rule("layer.weight", "skew"))


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("cache", "never", "cache=never"),
        ("share", True, "share=True"),
        ("chain", [{"weight_norm": {"dim": 1}}], r"weight_norm\(dim=1\)"),
        ("chain", [{"weight_norm": {"label": "norm"}}], "norm: weight_norm"),
    ],
)
def test_another_plan_on_the_same_site_may_differ_in_one_key(
    make: dict[str, Any], rule: Rule, key: str, value: Any, shown: str
) -> None:
    new = rewrite(make["Twice"](), rule("layer.weight", "weight_norm"))
    other = rule("layer.weight", "weight_norm")
    other["rules"][0][key] = value
    with pytest.raises(PlanError, match=rf"\(weight_norm\); rule 'rule' wants .*{shown}"):
        rewrite(new, other)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, X: Tensor) -> Tensor:
        return X * self.factor


@pytest.mark.parametrize("form", [lambda step: step, lambda step: nn.Sequential(step)], ids=["alone", "inside"])
def test_steps_given_as_modules_differ_by_their_settings(make: dict[str, Any], form: Any) -> None:
    def spec(factor: float) -> dict[str, Any]:
        chain = [form(Times(factor))]
        return {"reparam": 1, "rules": [{"name": "r", "select": "layer.weight", "chain": chain, "init": "raw"}]}

    new = rewrite(make["Twice"](), spec(2.0))
    assert rewrite(new, spec(2.0), inplace=True) is new
    with pytest.raises(PlanError, match=r"factor=2\.0.*wants.*factor=3\.0"):
        rewrite(new, spec(3.0))


def test_a_second_spec_adds_sites_to_a_rewritten_model(case: Any, rule: Rule) -> None:
    model, x, name = case
    others = [n for n, _ in model.named_parameters() if n != name]
    first = rewrite(model, rule(name, "weight_norm"))
    spec = {"reparam": 1, "rules": [{"name": "other", "select": others[-1], "chain": [Half()], "init": "raw"}]}
    both = rewrite(first, spec)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.get_parameter(others[-1]).div_(2)
    torch.testing.assert_close(both(x), expected(x))
    back = bake(bake(both, only=["rule"]))
    assert list(back.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(back(x), expected(x))


SCRIPT = """
import sys, torch, rewriter
model = torch.load(sys.argv[1], weights_only=False)
x, y = torch.load(sys.argv[2])
assert torch.equal(model(x), y)
baked = rewriter.bake(model)
torch.testing.assert_close(baked(x), y)
print(type(baked).__name__, *baked.state_dict())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["graph", "graph module", "module"])
def test_a_pickled_model_runs_and_bakes_in_a_fresh_process(kind: str, tmp_path: Path, rule: Rule) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.GRUCell(5, 5), nn.Linear(5, 2))
    if kind == "graph module":
        model = fx.symbolic_trace(model)
    new = rewrite(model, rule("1.weight_hh", "weight_norm"), capture="module" if kind == "module" else "auto")
    x = torch.randn(3, 4)
    torch.save(new, tmp_path / "new.pt")
    torch.save((x, new(x)), tmp_path / "io.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "new.pt"), str(tmp_path / "io.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = "Sequential" if kind != "graph module" else "GraphModule"
    assert done.stdout.split() == [expected, *model.state_dict()]


def test_copies_are_independent(case: Any, rule: Rule) -> None:
    model, x, name = case
    for capture in ("graph", "module"):
        new = rewrite(model, rule(name, "weight_norm"), capture=capture)
        clone = copy.deepcopy(new)
        y = new(x)
        with torch.no_grad():
            for p in new.parameters():
                p.zero_()
        torch.testing.assert_close(clone(x), y)
        del new
        torch.testing.assert_close(clone(x), y)
        assert type(bake(clone)) is type(model)
