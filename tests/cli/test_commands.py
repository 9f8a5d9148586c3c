"""The commands from end to end, with files."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from rewriter.io import load_model

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_rewritten_file_loads_and_bakes_without_trust(reparam, folder):
    applied = reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt")
    assert (applied.code, applied.out) == (0, "")
    assert "0.weight" in applied.err and "wrote rewritten.pt" in applied.err
    assert reparam("bake", "rewritten.pt", "-o", "baked.pt").code == 0
    model, rewritten, baked = (load_model(name) for name in ("model.pt", "rewritten.pt", "baked.pt"))
    assert type(baked) is nn.Sequential
    assert list(baked.state_dict()) == list(model.state_dict())
    assert torch.equal(baked[0].weight, baked[0].weight.T)
    assert torch.equal(baked(X), rewritten(X))


def test_apply_prints_one_document(reparam, folder):
    result = reparam("apply", "spec.yaml", "model.pt", "-o", "out.pt", "--json", "--example", "float32[2,4]")
    assert result.code == 0
    assert [site["name"] for site in result.json["sites"]] == ["0.weight", "2.weight"]
    assert result.json["output"] == "out.pt"
    assert result.json["checks"]["kept"] == 2
    assert result.json["checks"]["outputs"] < 1e-5


def test_plan_equals_dry_run_and_writes_nothing(reparam, folder):
    files = sorted(os.listdir())
    planned = reparam("plan", "spec.yaml", "model.pt")
    assert planned.code == 0
    assert "symmetric" in planned.out
    assert reparam("apply", "spec.yaml", "model.pt", "--dry-run").out == planned.out
    as_json = reparam("plan", "spec.yaml", "model.pt", "--json").json
    assert reparam("apply", "spec.yaml", "model.pt", "--dry-run", "--json").json == as_json
    assert sorted(os.listdir()) == files


def test_second_apply_changes_nothing(reparam, folder):
    assert reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt").code == 0
    again = reparam("apply", "spec.yaml", "rewritten.pt", "-o", "again.pt", "--json")
    assert again.code == 0, again.err
    assert all(site["present"] for site in again.json["sites"])
    assert reparam("diff", "rewritten.pt", "again.pt", "--json").json["equal"] is True


def test_part_bakes_by_rule_or_name(reparam, folder):
    reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt")
    part = reparam("bake", "rewritten.pt", "-o", "part.pt", "--only", "0.weight", "--json")
    assert (part.json["baked"], part.json["left"]) == (["0.weight"], ["2.weight"])
    rest = reparam("bake", "part.pt", "-o", "baked.pt", "--only", "even", "--json")
    assert (rest.json["baked"], rest.json["left"]) == (["2.weight"], [])
    missed = reparam("bake", "rewritten.pt", "-o", "none.pt", "--only", "nothing")
    assert missed.code == 4
    assert "'nothing'" in missed.err


def test_bake_can_restore_the_originals(reparam, folder):
    (folder / "spec.yaml").write_text((folder / "spec.yaml").read_text() + "    init: raw\n")
    reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt")
    assert reparam("bake", "rewritten.pt", "-o", "back.pt", "--keep", "original").code == 0
    assert torch.equal(load_model("back.pt")[0].weight, load_model("model.pt")[0].weight)


@pytest.mark.parametrize("written", [("scripted.pt", "--format", "torchscript"), ("scripted.ts",)])
def test_bake_writes_torchscript(reparam, folder, written):
    reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt")
    assert reparam("bake", "rewritten.pt", "-o", *written).code == 0
    assert torch.allclose(torch.jit.load(written[0])(X), load_model("rewritten.pt")(X))


def test_bake_writes_pt2_with_an_example(reparam, folder):
    reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt")
    bare = reparam("bake", "rewritten.pt", "-o", "out.pt2", "--format", "pt2")
    example = ("--example", "float32[3,4]", "--no-verify")  # test_serving.py reads the file back
    assert bare.code == 2 and "--example" in bare.err
    assert reparam("bake", "rewritten.pt", "-o", "out.pt2", "--format", "pt2", *example).code == 0
    assert torch.allclose(load_model("out.pt2", trust=True).module()(X), load_model("rewritten.pt")(X))


def test_bake_of_a_plain_model_warns_and_writes_it(reparam, folder):
    result = reparam("bake", "model.pt", "-o", "out.pt")
    assert result.code == 0
    assert "warning: bake found no computed tensor" in result.err
    assert reparam("diff", "model.pt", "out.pt", "--json").json["equal"] is True


def test_apply_reports_chains_and_the_largest_difference(reparam, folder):
    (folder / "norm.yaml").write_text(
        "reparam: 1\nrules:\n"
        "  - {name: a, select: 0.weight, chain: [{weight_norm: {dim: 0}}]}\n"
        "  - {name: b, select: 2.bias, chain: [identity]}\n"
    )
    one = reparam("apply", "norm.yaml", "model.pt", "-o", "one.pt").err
    assert (
        "wrote one.pt: 1 tensor computed by 'weight_norm'; 1 tensor computed by 'identity' (largest difference" in one
    )
    assert "from the plain model" in one and "2 unchanged" in one
    two = reparam("apply", "spec.yaml", "model.pt", "-o", "two.pt", "--json").json["checks"]
    assert two["computed"] == {"symmetric": 2}
    before, after = (load_model(name)[0].weight for name in ("model.pt", "two.pt"))
    difference = float((after - before).detach().abs().max() / before.detach().abs().max())
    assert two["largest_difference"] == pytest.approx(difference) or two["largest_difference"] > difference > 0.1


def test_validate(reparam, folder):
    assert "1 rule, no problem" in reparam("validate", "spec.yaml").out
    assert reparam("validate", "spec.yaml", "--json").json["rules"] == [{"name": "even", "chain": ["symmetric"]}]


def test_factory_from_the_working_folder_makes_the_module(reparam, folder):
    torch.save(nn.Sequential(nn.Linear(4, 4)).state_dict(), "weights.pt")
    result = reparam("plan", "spec.yaml", "weights.pt", "--model", "their_code:make", "--json")
    assert result.code == 0, result.err
    assert [site["name"] for site in result.json["sites"]] == ["0.weight"]
    assert "imported by their_code" in result.err


def test_parametrization_of_a_user_needs_allow_import(reparam, folder):
    (folder / "scale.yaml").write_text(
        "reparam: 1\nimports: {their: their_code}\nrules:\n"
        "  - {name: s, select: '*.weight', chain: [{their.Scale: {factor: 0.5}}]}\n"
    )
    refused = reparam("plan", "scale.yaml", "model.pt")
    assert refused.code == 3
    assert "--allow-import their_code" in refused.err
    assert "imported by" not in refused.err
    applied = reparam("apply", "scale.yaml", "model.pt", "-o", "out.pt", "--allow-import", "their_code", "--json")
    assert applied.code == 0, applied.err
    assert applied.json["checks"]["unmoved"] == 2
    refused = reparam("bake", "out.pt", "-o", "baked.pt")
    assert refused.code == 6
    assert "--allow their_code.Scale" in refused.err
    assert reparam("bake", "out.pt", "-o", "baked.pt", "--allow", "their_code.Scale").code == 0


def test_module_class_of_a_user_needs_allow(reparam, folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    import their_code

    torch.save(their_code.Net(), "net.pt")
    assert reparam("plan", "spec.yaml", "net.pt").code == 6
    allowed = ("--allow", "their_code.Net")
    assert reparam("apply", "spec.yaml", "net.pt", "-o", "out.pt", *allowed).code == 0
    assert reparam("bake", "out.pt", "-o", "baked.pt", *allowed).code == 0
    assert type(load_model("baked.pt", allow=["their_code.Net"])) is their_code.Net


@pytest.mark.parametrize("command", ["apply", "bake"])
def test_output_is_overwritten_only_with_force(reparam, folder, command):
    (folder / "out.pt").write_text("precious")
    arguments = ("apply", "spec.yaml", "model.pt") if command == "apply" else ("bake", "model.pt")
    refused = reparam(*arguments, "-o", "out.pt")
    assert refused.code == 6
    assert "--force" in refused.err
    assert (folder / "out.pt").read_text() == "precious"
    assert reparam(*arguments, "-o", "out.pt", "--force").code == 0
    assert isinstance(load_model("out.pt"), nn.Module)
