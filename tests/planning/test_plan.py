"""The plan says what will happen, reports every misfit at once, and changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import PlanError, load_spec, plan, rewrite
from rewriter.state import check_optimizer

Spec = dict[str, Any]


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))


def spec(*rules: Spec) -> Spec:
    return {"reparam": 1, "rules": [{"name": f"r{index}", **rule} for index, rule in enumerate(rules)]}


def test_plan_is_a_table_and_json(model: nn.Module) -> None:
    p = plan(model, spec({"select": "{0,3}.weight", "chain": ["symmetric", {"scale": {"factor": 2.0}}]}))
    text = str(p)
    assert text.splitlines()[0] == "<spec>: 2 sites, captured as graph"
    assert text.splitlines()[2].split() == ["site", "rule", "chain", "shape", "moved", "capture"]
    row = text.splitlines()[3]
    for word in ("0.weight", "r0", "symmetric >> scale(factor=2.0)", "4×4", "inlined"):
        assert word in row
    assert text.splitlines()[6] == "inlined: Linear as a function of its tensors"
    data = json.loads(json.dumps(p.to_dict()))
    assert [site["name"] for site in data["sites"]] == ["0.weight", "3.weight"]
    assert set(data["sites"][0]) >= {"name", "names", "rule", "chain", "shape", "capture", "moved", "dtype", "kind"}


def test_reasons_of_several_captures_name_their_sites(model: nn.Module) -> None:
    model[3].register_forward_hook(lambda *_: None)
    lines = str(plan(model, spec({"select": "{0,3}.weight", "chain": ["symmetric"]}))).splitlines()
    assert "inlined: Linear as a function of its tensors (0.weight)" in lines
    assert any(line.startswith("called: ") and line.endswith(" (3.weight)") for line in lines)


def test_plans_and_specs_are_tables_in_notebooks_with_escaped_names() -> None:
    hostile = nn.Module()
    hostile.add_module("<b>", nn.Linear(2, 2))
    spec = load_spec({"reparam": 1, "rules": [{"name": "<i>", "select": "**.weight", "chain": ["symmetric"]}]})
    for shown in (plan(hostile, spec)._repr_html_(), spec._repr_html_()):
        assert shown.count("<tr>") == 2
        assert "<td>&lt;i&gt;</td>" in shown
        assert "<b>" not in shown
        assert "symmetric" in shown


def test_moved_says_how_far_the_value_goes(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight + model[0].weight.T)
    p = plan(model, spec({"select": "{0,3}.weight", "chain": ["symmetric"]}))
    assert p.by_name["0.weight"].moved == pytest.approx(0, abs=1e-7)
    new = rewrite(model, spec({"select": "{0,3}.weight", "chain": ["symmetric"]}))
    after, before = new.get_submodule("3").weight.detach(), model[3].weight.detach()
    assert p.by_name["3.weight"].moved == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)


def test_plan_changes_nothing(model: nn.Module) -> None:
    before, rng = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    plan(
        model,
        spec({"select": "*.weight", "except": "1.*", "chain": [{"orthogonal": {"map": "cayley"}}, "spectral_norm"]}),
    )
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes


@pytest.mark.parametrize(
    ("rules", "messages"),
    [
        ([{"select": "0.wieght", "chain": ["skew"]}], ["select 0.wieght matches no tensor", "did you mean '0.weight'"]),
        ([{"select": {"module": "torch.nn.Linaer"}, "chain": ["skew"]}], ["did you mean torch.nn.Linear?"]),
        ([{"select": {"module": "Conv2d", "ndim": 4}, "chain": ["skew"]}], ["modules that own tensors are Linear"]),
        ([{"select": ["0.weight", "9.weight"], "chain": ["skew"]}], ["select 9.weight matches no tensor"]),
        (
            [{"select": "*.weight", "except": "7.*", "chain": [{"scale": {"factor": 1.0}}]}],
            ["except 7.* matches no tensor"],
        ),
        ([{"select": "*.weight", "expect": 3, "chain": [{"scale": {"factor": 1.0}}]}], ["owns 4 sites; it expects 3"]),
        (
            [{"select": "*.weight", "expect": "5..", "chain": [{"scale": {"factor": 1.0}}]}],
            ["owns 4 sites; it expects 5.."],
        ),
        (
            [{"select": "0.weight", "chain": ["skew"]}, {"select": "0.*", "chain": [{"scale": {"factor": 1.0}}]}],
            ["0.weight is claimed by the rules 'r0', 'r1'", "overrides: [r0]"],
        ),
        ([{"select": "4.weight", "chain": ["skew"]}], ["rule 'r0' on 4.weight", "skew acts on square matrices"]),
        (
            [{"select": "4.weight", "chain": [{"cast": {"dtype": "float64"}}]}],
            ["the chain gives float64[2, 4] where the model has float32[2, 4]", "unsafe: true"],
        ),
        (
            [{"select": "4.weight", "per": {"dim": 0, "chunks": 3}, "chain": [{"scale": {"factor": 1.0}}]}],
            ["`per` wants 3 equal chunks of dimension 0, which has size 2"],
        ),
        (
            [{"select": "4.weight", "reshape": [3, -1], "chain": [{"scale": {"factor": 1.0}}]}],
            ["`reshape` [3, -1] does not divide"],
        ),
        (
            [{"select": "4.weight", "from": "5.weight", "chain": ["transpose"]}],
            ["4.weight is computed from '5.weight', which the model does not have", "did you mean '3.weight'"],
        ),
        (
            [
                {"select": "0.weight", "from": "3.weight", "chain": [{"scale": {"factor": 1.0}}]},
                {"select": "3.weight", "from": "0.weight", "chain": [{"scale": {"factor": 1.0}}]},
            ],
            ["is computed from itself: "],
        ),
        (
            [{"select": "0.weight", "init": "raw", "chain": ["weight_norm"]}],
            ["weight_norm", "its forward takes", "the chain gives it 1 tensors"],
        ),
        (
            [{"select": {"module": "Linear"}, "joint": ["weight", "scale"], "chain": [{"scale": {"factor": 1.0}}]}],
            ["0 has no 0.scale"],
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(model: nn.Module, rules: list[Spec], messages: list[str]) -> None:
    before = copy.deepcopy(model.state_dict())
    for verb in (plan, lambda m, s: rewrite(m, s, inplace=True)):
        with pytest.raises(PlanError) as caught:
            verb(model, spec(*rules))
        for message in messages:
            assert message in str(caught.value)
        assert caught.value.diagnostics
    assert list(model.state_dict()) == list(before)


def test_all_problems_are_reported_together(model: nn.Module) -> None:
    with pytest.raises(PlanError) as caught:
        plan(
            model,
            spec(
                {"select": "nothing", "chain": ["skew"]},
                {"select": "0.weight", "expect": 2, "chain": ["skew"]},
                {"select": "0.weight", "chain": ["symmetric"]},
            ),
        )
    assert len(caught.value.diagnostics) >= 3


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ([{"name": "a", "chain": ["skew"]}], "acts on square matrices, this tensor has shape [5, 4]"),
        ([{"name": "a", "chain": ["orthogonal"], "from": "nope"}], "computed from 'nope'"),
        (
            [{"name": "a", "chain": ["symmetric"]}, {"name": "b", "chain": ["symmetric"]}],
            "claimed by the rules 'a', 'b'",
        ),
    ],
    ids=["sizes differ", "hints differ", "rivals"],
)
def test_one_problem_of_ten_tensors_is_one_diagnostic_with_ten_names(rules: list[Spec], problem: str) -> None:
    many = nn.Sequential(*[nn.Linear(4, 5 + 4 * size) for size in range(10)])
    with pytest.raises(PlanError) as caught:
        plan(many, {"reparam": 1, "rules": [{**rule, "select": "*.weight"} for rule in rules]})
    (diagnostic,) = caught.value.diagnostics
    assert problem in diagnostic.message
    assert all(f"{index}.weight" in diagnostic.message for index in range(10))


def test_problems_of_a_text_spec_have_positions(model: nn.Module) -> None:
    text = "reparam: 1\nrules:\n  - name: a\n    select: 'o.weight'\n    chain: [skew]\n"
    with pytest.raises(PlanError) as caught:
        plan(model, text)
    diagnostic = caught.value.diagnostics[0]
    assert (diagnostic.line, diagnostic.column) == (4, 13)
    assert "^" in str(caught.value)


def test_overrides_settles_who_owns_a_tensor(model: nn.Module) -> None:
    rules = [
        {"select": "*.weight", "except": "1.*", "chain": [{"scale": {"factor": 1.0}}]},
        {"select": "0.weight", "overrides": ["r0"], "chain": ["symmetric"]},
        {"select": "4.weight", "overrides": ["r0"], "chain": []},
    ]
    assert {site.name: site.rule for site in plan(model, spec(*rules))} == {"0.weight": "r1", "3.weight": "r0"}


def test_a_rule_whose_sites_all_went_elsewhere_says_where(model: nn.Module) -> None:
    rules = [
        {"select": "0.weight", "chain": [{"scale": {"factor": 1.0}}]},
        {"select": "0.weight", "overrides": ["r0"], "chain": ["symmetric"]},
    ]
    with pytest.raises(PlanError, match=r"'r0' owns 0 sites; it expects 1\.\.(.|\n)*went to 'r1'"):
        plan(model, spec(*rules))


class Broken(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X

    def right_inverse(self, X: Tensor) -> Tensor:
        raise ValueError("no inverse of that")


def test_a_failing_right_inverse_names_the_step_and_the_way_out(model: nn.Module) -> None:
    rule: Callable[..., Spec] = lambda **more: {"select": "0.weight", "chain": [Broken()], **more}  # noqa: E731
    with pytest.raises(PlanError, match=r"step 1, Broken: its right inverse fails .*no inverse of that.*init: raw"):
        plan(model, spec(rule()))
    assert len(plan(model, spec(rule(init="raw")))) == 1


def test_the_plan_says_how_each_site_is_captured_and_why() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return self.fc(x)
            return x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.direct = nn.Parameter(torch.randn(4, 4))
            self.fc, self.odd, self.unused = nn.Linear(4, 4), Branching(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.odd(self.fc(x) @ self.direct)

    p = plan(Net(), spec({"select": ["**.weight", "direct"], "chain": [{"scale": {"factor": 2.0}}]}))
    assert p.root == "graph"
    assert {site.name: site.capture for site in p} == {
        "direct": "graph",
        "fc.weight": "inlined",
        "odd.fc.weight": "called",
        "unused.weight": "unused",
    }
    assert "if x.sum() > 0" in p.by_name["odd.fc.weight"].why
    whole = plan(Branching(), spec({"select": "fc.weight", "chain": [{"scale": {"factor": 2.0}}]}))
    assert whole.root == "module"
    assert "control flow" in whole.why
    assert "if x.sum() > 0" in whole.why


def test_a_present_site_is_captured_as_before(model: nn.Module) -> None:
    rules = spec({"select": "0.weight", "chain": ["skew"]})
    first, again = plan(model, rules).sites[0], plan(rewrite(model, rules), rules).sites[0]
    assert (again.present, again.capture, again.why) == (True, first.capture, first.why)


@pytest.mark.parametrize(
    ("chain", "added"),
    [
        (["weight_norm"], ["original0"]),
        (["symmetric"], []),
        ([{"low_rank": {"rank": 1}}], ["original0", "original1"]),
        ([{"lora": {"r": 1}}], ["0.lora_A", "0.lora_B"]),
    ],
)
def test_plan_names_what_an_optimizer_lacks(chain: list[Any], added: list[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = plan(model, {"reparam": 1, "rules": [{"name": "a", "select": "0.weight", "chain": chain}]})
    assert made.added == tuple(f"0.parametrizations.weight.{name}" for name in added)
    assert made.to_dict()["added"] == [*made.added]
    assert ("which an optimizer built before lacks: " in str(made)) is bool(added)
    found = check_optimizer(optimizer, rewrite(model, made, inplace=True))
    assert [text.partition(":")[0] for text in found if "no group" in text] == [*made.added]


def test_a_plan_says_how_sparse_a_value_is_and_on_what_a_chain_works() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LSTM(4, 4))
    pruned = {"select": "0.weight", "chain": [{"l1_unstructured": {"amount": 0.5}}]}
    gates = {"select": "1.weight_hh_l0", "per": {"dim": 0, "chunks": 4}, "chain": ["orthogonal"]}
    found = plan(model, spec(pruned, gates))
    assert [site.zeros for site in found] == [0.5, 0.0]
    assert "(50% zeros)" in str(found) and "orthogonal on each of 4 chunks" in str(found)
    assert str(found).count("moved: the norm of the change, divided by the norm of the old value") == 1
