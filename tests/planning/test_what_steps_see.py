"""What a step is constructed for: its tensor, the rule's other sites, the spec's folder, the precision before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import PlanError, bake, load_spec, plan, register, rewrite
from rewriter.planning import Plan


def spec(select: Any, *chain: Any, **options: Any) -> dict[str, Any]:
    return {"reparam": 1, "rules": [{"name": "r", "select": select, "chain": list(chain), **options}]}


def two(scale: float = 10.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[1].weight.mul_(scale)
    return model


def test_a_global_budget_is_shared_by_the_sites() -> None:
    new = rewrite(two(), spec("*.weight", {"global_l1": {"amount": 0.5}}))
    kept = [int(new.get_submodule(name).weight.count_nonzero()) for name in "01"]
    assert sum(kept) == 16
    assert kept[1] > kept[0]


def test_a_global_budget_counts_each_chunk_on_its_own() -> None:
    model = two()
    with torch.no_grad():
        model[0].weight[:2] /= 100
    new = rewrite(model, spec("*.weight", {"global_l1": {"amount": 16}}, per={"dim": 0, "chunks": 2}))
    whole = rewrite(model, spec("*.weight", {"global_l1": {"amount": 16}}))
    for name in "01":
        assert torch.equal(new.get_submodule(name).weight, whole.get_submodule(name).weight)


def test_a_global_budget_looks_at_what_the_later_steps_map_to_the_weights() -> None:
    class Tenth(nn.Module):
        def forward(self, X: Tensor) -> Tensor:
            return X / 10

        def right_inverse(self, value: Tensor) -> Tensor:
            return value * 10

    model = two(1.0)
    with torch.no_grad():
        model[1].weight.fill_(20.0)
    found: dict[str, Tensor] = {}

    @register("planned_by_value")
    class Planned(nn.Module):
        @classmethod
        def plan_sites(cls, weights: list[Tensor], names: list[str]) -> list[dict[str, Any]]:
            found.update(zip(names, weights, strict=True))
            return [{} for _ in weights]

        def forward(self, X: Tensor) -> Tensor:
            return X

    rewrite(model, spec("1.weight", "planned_by_value", Tenth()))
    assert list(found) == ["1.weight"]
    torch.testing.assert_close(found["1.weight"], torch.full((4, 4), 200.0))


def test_a_planner_that_refuses_is_an_error_of_the_plan() -> None:
    with pytest.raises(PlanError, match=r"step 1, global_l1\(amount=99\)"):
        rewrite(two(), spec("*.weight", {"global_l1": {"amount": 99}}))


def test_files_are_looked_for_beside_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    masks = {"0.weight": torch.eye(4), "1.weight": torch.eye(4).flip(0)}
    torch.save(masks, folder / "masks.pt")
    text = 'reparam: 1\nrules:\n  - {name: r, select: "*.weight", chain: [{mask: {file: masks.pt}}]}\n'
    (folder / "spec.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    new = rewrite(two(), "project/spec.yaml")
    for name, mask in masks.items():
        value = new.get_submodule(name.removesuffix(".weight")).weight
        assert torch.equal(value != 0, mask != 0)
    with pytest.raises(PlanError, match="there is no mask file"):
        rewrite(two(), load_spec(text))


def test_a_step_computes_in_the_precision_that_a_cast_gives_it() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    chain = [{"cast": {"dtype": "float64"}}, {"orthogonal": {"map": "cayley"}}, {"cast": {"dtype": "float32"}}]
    new = rewrite(model, spec("0.weight", *chain))
    site = new.get_submodule("0.parametrizations.weight")
    assert getattr(site, "1").base.dtype == torch.float64
    assert site.original.dtype == torch.float32
    Q = new.get_submodule("0").weight
    assert Q.dtype == torch.float32
    torch.testing.assert_close(Q @ Q.T, torch.eye(6))
    torch.testing.assert_close(bake(new)(torch.ones(1, 6)), new(torch.ones(1, 6)))


def test_a_cast_alone_changes_the_dtype_where_the_rule_says_so() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    chain = [{"cast": {"dtype": "float64"}}, "orthogonal"]
    with pytest.raises(PlanError, match="unsafe: true"):
        rewrite(model, spec("0.weight", *chain))
    new = rewrite(model, spec("0.weight", *chain, unsafe=True))
    Q = new.get_submodule("0").weight
    torch.testing.assert_close(Q @ Q.T, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("name", ["orthogonal", "stiefel", "psd", "spectral_norm", "weight_norm", "n_m"])
def test_a_model_without_values_can_be_planned_and_rewritten(name: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    found: Plan = plan(model, spec("0.weight", name))
    assert [site.moved for site in found] == [None]
    new = rewrite(model, spec("0.weight", name))
    assert new(torch.empty(2, 8, device="meta")).shape == (2, 8)
    same = rewrite(nn.Sequential(nn.Linear(8, 8)), spec("0.weight", name))
    assert new.state_dict().keys() == same.state_dict().keys()


class Mix(nn.Module):
    def forward(self, X: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return X + 2 * first - second

    def right_inverse(self, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return value - 2 * first + second


register("mix_two")(Mix)


@pytest.mark.parametrize("chain", [["mix"], ["half", "mix"], ["mix", "half"], ["half", "mix", "mix"]])
def test_a_step_takes_several_tensors_anywhere_in_a_chain(chain: list[str], capture: str) -> None:
    steps = {
        "mix": {"mix_two": {"inputs": ["0.weight", "1.weight"]}},
        "half": {"scale": {"factor": 0.5}},
    }
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    new = rewrite(model, spec("2.weight", *(steps[name] for name in chain)), capture=capture)
    torch.testing.assert_close(new(x), model(x))
    value = new.get_submodule("2.parametrizations.weight").original
    for name in chain:
        value = value * 0.5 if name == "half" else value + 2 * model[0].weight - model[1].weight
    torch.testing.assert_close(value, model[2].weight)
    new(x).sum().backward()
    torch.testing.assert_close(bake(new)(x), model(x))


def test_steps_before_one_with_inputs_see_what_it_maps_to_the_weight() -> None:
    model = two(1.0)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4) * 100)
    affine = {"affine": {"inputs": ["0.weight"]}}
    new = rewrite(model, spec("1.weight", {"l1_unstructured": {"amount": 4}}, affine))
    kept = getattr(new.get_submodule("1.parametrizations.weight"), "0").mask
    seen = (model[1].weight - model[0].weight).abs().flatten()
    assert set(seen.topk(12).indices.tolist()) == set(kept.flatten().nonzero().flatten().tolist())
