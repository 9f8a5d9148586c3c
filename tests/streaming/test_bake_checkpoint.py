"""Baking a checkpoint shard by shard gives what baking the model in memory gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from rewriter import PlanError, bake, rewrite
from rewriter.streaming import apply_checkpoint, bake_checkpoint
from tests.parametrizations.test_catalog_in_specs import ADAPTERS, FACTORS, IN_PLACE
from tests.parametrizations.test_laws import MEMBERS, title
from tests.streaming.conftest import assert_equal, contiguous, read_folder, spec, tree, write_folder

FORMS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    *MEMBERS,
    *((name, (8, 6), arguments) for step in (*IN_PLACE, *ADAPTERS, *FACTORS) for name, arguments in step.items()),
]
FIRST = list({form[0]: form for form in reversed(FORMS)}.values())
"""One of each name; the others are slow tests."""
SQUARE = ("hurwitz_stable", "gl_plus", "sl")
"""Their right inverses want a value of the space."""


def moved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change the originals, as training does."""
    return {
        name: tensor + torch.randn_like(tensor) / 10 if "original" in name and tensor.is_floating_point() else tensor
        for name, tensor in contiguous(state).items()
    }


@pytest.mark.parametrize(
    "member",
    [pytest.param(form, id=title(form), marks=() if form in FIRST else pytest.mark.slow) for form in FORMS],
)
def test_stored_tensors_become_the_value_of_every_family(
    member: tuple[str, tuple[int, ...], dict[str, Any]], tmp_path: Path
) -> None:
    name, shape, arguments = member
    rules = spec({name: arguments}, init="sample" if name in SQUARE else "keep")
    model = rewrite(tree({"fc.weight": torch.randn(shape) / 3, "fc.bias": torch.randn(4)}), rules, capture="module")
    state = moved(model.state_dict())
    model.load_state_dict(state)
    save_file(state, tmp_path / "in.safetensors")
    bake_checkpoint(tmp_path / "in.safetensors", rules, tmp_path / "out.safetensors")
    assert_equal(load_file(tmp_path / "out.safetensors"), bake(model).state_dict())


@pytest.mark.parametrize("member", [form for form in FORMS[::3] if form[0] not in SQUARE], ids=title)
def test_plain_tensors_become_what_rewrite_and_bake_give(
    member: tuple[str, tuple[int, ...], dict[str, Any]], tmp_path: Path
) -> None:
    name, shape, arguments = member
    tensors = {"fc.weight": torch.randn(shape) / 3, "fc.bias": torch.randn(4)}
    save_file(tensors, tmp_path / "in.safetensors")
    rules = spec({name: arguments})
    bake_checkpoint(tmp_path / "in.safetensors", rules, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["fc.bias"], tensors["fc.bias"])
    wanted = bake(rewrite(tree(tensors), rules, capture="module")).state_dict()["fc.weight"]
    rtol = 1e-2 if "norm" in name else 1e-5  # a power iteration starts at random
    torch.testing.assert_close(found["fc.weight"], wanted, rtol=rtol, atol=rtol)
    apply_checkpoint(tmp_path / "in.safetensors", rules, tmp_path / "stored.safetensors")
    bake_checkpoint(tmp_path / "stored.safetensors", rules, tmp_path / "again.safetensors")
    assert_equal(load_file(tmp_path / "again.safetensors"), found)


def both(
    tensors: dict[str, Tensor], rules: dict[str, Any], tmp_path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the baked tensors of a rewritten model: through a file, and in memory."""
    model = rewrite(tree(tensors), rules, capture="module")
    state = moved(model.state_dict())
    model.load_state_dict(state)
    save_file(state, tmp_path / "in.safetensors")
    bake_checkpoint(tmp_path / "in.safetensors", rules, tmp_path / "out.safetensors", force=True)
    return load_file(tmp_path / "out.safetensors"), contiguous(bake(model).state_dict())


CHAINS: list[list[Any]] = [
    [{"scale": {"factor": 2.0}}, "weight_norm"],
    [{"scale": {"factor": 0.7}}, {"scale": {"factor": 1.3}}, "symmetric"],
    ["spectral_norm", {"lora": {"r": 2}}],
    [{"l1_unstructured": {"amount": 3}}, {"l1_unstructured": {"amount": 0.5}}],
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_chains_are_baked_to_the_bit(chain: list[Any], dtype: torch.dtype, tmp_path: Path) -> None:
    found, wanted = both({"a.weight": torch.randn(6, 6).to(dtype)}, spec(*chain), tmp_path)
    assert_equal(found, wanted)


def test_gates_and_reshaped_kernels_are_baked_to_the_bit(tmp_path: Path) -> None:
    tensors = {"rnn.weight_hh_l0": torch.randn(16, 4), "conv.weight": torch.randn(6, 2, 3, 3)}
    gates = spec("orthogonal", select="rnn.*", per={"dim": 0, "chunks": 4})["rules"][0]
    kernel = spec("stiefel", select="conv.*", reshape=["out", -1])["rules"][0]
    rules = {"reparam": 1, "rules": [gates, {**kernel, "name": "kernel"}]}
    assert_equal(*both(tensors, rules, tmp_path))


def test_a_tensor_read_from_a_computed_one_is_baked_to_the_bit(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4)}
    rules = {
        "reparam": 1,
        "rules": [
            {"name": "a", "select": "a.weight", "chain": ["symmetric"]},
            {"name": "b", "select": "b.weight", "chain": [{"affine": {"inputs": ["a.weight"]}}]},
        ],
    }
    assert_equal(*both(tensors, rules, tmp_path))


def test_a_tensor_without_storage_comes_back(tmp_path: Path) -> None:
    tensors = {"embed.weight": torch.randn(6, 4), "head.weight": torch.randn(4, 6)}
    rules = spec("transpose", select="head.weight", **{"from": "embed.weight"})
    save_file(tensors, tmp_path / "in.safetensors")
    apply_checkpoint(tmp_path / "in.safetensors", rules, tmp_path / "stored.safetensors")
    assert list(load_file(tmp_path / "stored.safetensors")) == ["embed.weight"]
    bake_checkpoint(tmp_path / "stored.safetensors", rules, tmp_path / "out.safetensors")
    wanted = {"embed.weight": tensors["embed.weight"], "head.weight": tensors["embed.weight"].mT.contiguous()}
    assert_equal(load_file(tmp_path / "out.safetensors"), wanted)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    rules = spec("weight_norm", select="head.weight")
    model = Tied()
    save_model(model, str(tmp_path / "plain.safetensors"))
    apply_checkpoint(tmp_path / "plain.safetensors", rules, tmp_path / "stored.safetensors")
    rewritten = rewrite(Tied(), rules)
    found = load_file(tmp_path / "stored.safetensors")
    with safe_open(tmp_path / "stored.safetensors", "pt") as file:
        found.update({name: found[kept] for name, kept in file.metadata().items() if kept in found})
    rewritten.load_state_dict(found)
    bake_checkpoint(tmp_path / "stored.safetensors", rules, tmp_path / "out.safetensors")
    assert_equal(load_file(tmp_path / "out.safetensors"), {"embed.weight": bake(rewritten).embed.weight.detach()})
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"head.weight": "embed.weight"}


def test_a_folder_keeps_its_shards_index_and_other_files(tmp_path: Path) -> None:
    shards = [{"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4)}, {"b.weight": torch.randn(4, 4)}]
    folder = write_folder(tmp_path / "in", shards, config_json='{"model_type": "x"}', notes="text")
    bake_checkpoint(folder, spec("symmetric"), tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in folder.iterdir())
    assert (out / "config.json").read_text() == '{"model_type": "x"}'
    index = [json.loads((one / "model.safetensors.index.json").read_text()) for one in (folder, out)]
    assert index[0] == index[1]
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as before, safe_open(out / file.name, "pt") as after:
            assert sorted(before.keys()) == sorted(after.keys())
            assert before.metadata() == after.metadata() == {"format": "pt"}
    wanted = {name: tensor for shard in shards for name, tensor in shard.items()}
    wanted |= {name: (tensor + tensor.mT) / 2 for name, tensor in wanted.items() if name.endswith("weight")}
    torch.testing.assert_close(read_folder(out), wanted)


def test_applied_folders_load_into_the_rewritten_model(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4), "b.bias": torch.randn(4)}
    folder = write_folder(tmp_path / "in", [{name: tensor} for name, tensor in tensors.items()])
    rules = spec("weight_norm")
    apply_checkpoint(folder, rules, tmp_path / "stored")
    model = rewrite(tree({name: torch.randn_like(tensor) for name, tensor in tensors.items()}), rules)
    model.load_state_dict(read_folder(tmp_path / "stored"))
    wanted = rewrite(tree(tensors), rules, capture="module").state_dict()
    assert_equal(read_folder(tmp_path / "stored"), contiguous(wanted))
    bake_checkpoint(tmp_path / "stored", rules, tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), contiguous(bake(model).state_dict()))


def test_applying_twice_changes_nothing(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(4, 4)}, tmp_path / "in.safetensors")
    apply_checkpoint(tmp_path / "in.safetensors", spec("weight_norm"), tmp_path / "one.safetensors")
    apply_checkpoint(tmp_path / "one.safetensors", spec("weight_norm"), tmp_path / "two.safetensors")
    assert_equal(load_file(tmp_path / "two.safetensors"), load_file(tmp_path / "one.safetensors"))


def test_another_chain_than_the_stored_one_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(4, 4)}, tmp_path / "in.safetensors")
    apply_checkpoint(tmp_path / "in.safetensors", spec("symmetric"), tmp_path / "one.safetensors")
    with pytest.raises(PlanError, match=r"a\.weight.*was saved from the chain symmetric.*skew"):
        bake_checkpoint(tmp_path / "one.safetensors", spec("skew"), tmp_path / "two.safetensors")


def test_computed_tensors_that_no_rule_owns_are_refused(tmp_path: Path) -> None:
    stored = {"a.parametrizations.weight.original": torch.randn(4, 4), "b.weight": torch.randn(4, 4)}
    save_file(stored, tmp_path / "in.safetensors")
    with pytest.raises(PlanError, match=r"no rule of the spec computes a\.weight"):
        bake_checkpoint(tmp_path / "in.safetensors", spec("symmetric", select="b.weight"), tmp_path / "out.safetensors")


def test_all_refused_values_are_named(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": torch.eye(3) for name in "abc"}
    tensors["a.weight"][0, 0] = torch.nan
    tensors["c.weight"][1, 1] = torch.inf
    folder = write_folder(tmp_path / "in", [{name: tensor} for name, tensor in tensors.items()])
    with pytest.raises(PlanError) as refused:
        apply_checkpoint(folder, spec("symmetric"), tmp_path / "out")
    assert "a.weight has 1 of 9 entries" in str(refused.value)
    assert "c.weight has 1 of 9 entries" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_selectors_that_need_a_model_ask_for_it(tmp_path: Path) -> None:
    save_file({"0.weight": torch.randn(4, 4), "0.bias": torch.randn(4)}, tmp_path / "in.safetensors")
    rules = spec("symmetric", select={"module": "Linear", "tensor": "weight"})
    with pytest.raises(PlanError, match=r"asks for `module`[^$]*--model"):
        bake_checkpoint(tmp_path / "in.safetensors", rules, tmp_path / "out.safetensors")
    factory = lambda: nn.Sequential(nn.Linear(4, 4))  # noqa: E731
    bake_checkpoint(tmp_path / "in.safetensors", rules, tmp_path / "out.safetensors", model=factory)
    found, given = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "in.safetensors")
    torch.testing.assert_close(found["0.weight"], (given["0.weight"] + given["0.weight"].mT) / 2)


def test_a_model_tells_the_shape_that_the_stored_tensors_do_not(tmp_path: Path) -> None:
    tensors = {"0.weight": torch.randn(4, 2, 3, 3), "0.bias": torch.randn(4)}
    rules = spec("weight_norm", reshape=["out", -1])
    model = rewrite(tree(tensors), rules, capture="module")
    save_file(contiguous(model.state_dict()), tmp_path / "in.safetensors")
    with pytest.raises(PlanError, match="--model"):
        bake_checkpoint(tmp_path / "in.safetensors", rules, tmp_path / "out.safetensors")
    factory = lambda: nn.Sequential(nn.Conv2d(2, 4, 3))  # noqa: E731
    bake_checkpoint(tmp_path / "in.safetensors", rules, tmp_path / "out.safetensors", model=factory)
    assert_equal(load_file(tmp_path / "out.safetensors"), contiguous(bake(model).state_dict()))


@pytest.mark.parametrize("rule", [{"share": True}, {"chain": [{"global_l1": {"amount": 0.5}}]}], ids=str)
def test_rules_over_all_tensors_together_are_refused(rule: dict[str, Any], tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4)}, tmp_path / "in.safetensors")
    rules = {"reparam": 1, "rules": [{"name": "all", "select": "*.weight", "chain": ["symmetric"], **rule}]}
    with pytest.raises(PlanError, match="in memory together"):
        apply_checkpoint(tmp_path / "in.safetensors", rules, tmp_path / "out.safetensors")


def test_a_kernel_that_may_be_a_transposed_one_is_refused(tmp_path: Path) -> None:
    save_file({"0.weight": torch.randn(4, 4, 3, 3), "0.bias": torch.randn(4)}, tmp_path / "in.safetensors")
    with pytest.raises(PlanError, match=r"0\.weight is a kernel.*transposed[^$]*dim: 0"):
        apply_checkpoint(tmp_path / "in.safetensors", spec("spectral_norm"), tmp_path / "out.safetensors")
    factory = lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3))  # noqa: E731
    apply_checkpoint(tmp_path / "in.safetensors", spec("spectral_norm"), tmp_path / "a.safetensors", model=factory)
    told = spec({"spectral_norm": {"dim": 1}})
    apply_checkpoint(tmp_path / "in.safetensors", told, tmp_path / "b.safetensors")
    assert_equal(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))


class Fold(nn.Module):
    """Scale the rows of a weight and the bias together."""

    def forward(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * weight, bias + weight.sum(1)

    def right_inverse(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weight, bias = values
        return weight / 2, bias - weight.sum(1) / 2


def test_tensors_computed_together_are_rewritten_and_baked(tmp_path: Path) -> None:
    tensors = {"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4)}
    rules = {"reparam": 1, "rules": [{"name": "j", "select": "fc", "joint": ["weight", "bias"], "chain": [Fold()]}]}
    folder = write_folder(tmp_path / "in", [{name: tensor} for name, tensor in tensors.items()])
    apply_checkpoint(folder, rules, tmp_path / "stored")
    wanted = rewrite(tree(tensors), rules, capture="module")
    assert_equal(read_folder(tmp_path / "stored"), contiguous(wanted.state_dict()))
    bake_checkpoint(tmp_path / "stored", rules, tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), contiguous(bake(wanted).state_dict()))
