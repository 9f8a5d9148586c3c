"""The commands on ExportedPrograms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewriter
from rewriter.io import load_model

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))

LABELLED = """\
reparam: 1
rules:
  - {name: one, select: "0.weight", chain: [{symmetric: {label: even}}]}
  - {name: two, select: "2.weight", chain: [{weight_norm: {label: length}}, {symmetric: {label: half}}]}
"""


@pytest.fixture
def reparam(reparam):
    """Run `reparam` with trust in the model file, which a program needs."""
    return lambda *arguments: reparam(*arguments, "--trust")


@pytest.fixture
def program(folder):
    """The module of `model.pt`, exported."""
    torch.export.save(torch.export.export(load_model("model.pt").eval(), (X,)), folder / "model.pt2")
    return folder / "model.pt2"


@pytest.fixture
def rewritten(reparam, program):
    result = reparam("apply", "spec.yaml", program, "-o", "rewritten.pt2")
    assert result.code == 0, result.err
    return program.with_name("rewritten.pt2")


@pytest.fixture
def rewritten_module(folder):
    """A rewritten module, exported by torch."""
    new = rewriter.rewrite(load_model("model.pt").eval(), "spec.yaml")
    torch.export.save(torch.export.export(new, (X,)).run_decompositions(), folder / "exported.pt2")
    return folder / "exported.pt2"


def test_apply_and_bake_a_program(reparam, program):
    applied = reparam("apply", "spec.yaml", program, "-o", "rewritten.pt2", "--example", "float32[3,4]", "--json")
    assert applied.code == 0, applied.err
    assert applied.json["checks"]["kept"] == 2
    assert applied.json["checks"]["outputs"] < 1e-5
    baked = reparam("bake", "rewritten.pt2", "-o", "baked.pt2", "--no-verify", "--json")
    assert (baked.json["baked"], baked.json["format"]) == (["0.weight", "2.weight"], "pt2")
    before, new, after = (load_model(name, trust=True) for name in (program, "rewritten.pt2", "baked.pt2"))
    assert list(after.state_dict) == list(before.state_dict)
    assert torch.equal(after.state_dict["0.weight"], after.state_dict["0.weight"].T)
    assert torch.allclose(after.module()(X), new.module()(X))


def test_plan_of_a_program_equals_the_plan_of_its_module(reparam, program):
    of_program = reparam("plan", "spec.yaml", program, "--json").json
    of_module = reparam("plan", "spec.yaml", "model.pt", "--json").json
    assert of_program["root"] == "export"
    assert all(site["capture"] == "export" and site["why"] for site in of_program["sites"])
    for document in (of_program, of_module):
        for site in document["sites"]:
            site["capture"], site["why"] = "", ""
            site["moved"] = pytest.approx(site["moved"], abs=1e-6)
    assert of_program["sites"] == of_module["sites"]
    assert of_program.keys() == of_module.keys()
    assert reparam("apply", "spec.yaml", program, "--dry-run", "--json").json["root"] == "export"


def test_inspect_explain_diff_and_draw_read_programs(reparam, program, rewritten):
    tensors = {tensor["names"][0]: tensor for tensor in reparam("inspect", rewritten, "--json").json["tensors"]}
    of_module = reparam("inspect", "model.pt", "--json").json["tensors"]
    assert list(tensors) == [tensor["names"][0] for tensor in of_module]
    assert (tensors["0.weight"]["chain"], tensors["0.weight"]["rule"]) == (["symmetric"], "even")
    assert tensors["0.bias"]["chain"] is None
    explained = reparam("explain", "spec.yaml", rewritten, "0.weight", "--json").json
    assert explained["owners"] == ["even"]
    assert reparam("explain", "spec.yaml", rewritten, "0.wieght").code == 4
    chains = reparam("diff", program, rewritten, "--json").json["chains"]
    assert {row["name"]: row["detail"] for row in chains} == {
        "0.weight": "plain → symmetric",
        "2.weight": "plain → symmetric",
    }
    drawn = reparam("draw", rewritten).out
    assert "%1 = 0.parametrizations.weight.original\n" in drawn
    assert "# 0.weight: symmetric" in drawn


def test_second_apply_changes_nothing_or_is_refused(reparam, folder, rewritten):
    again = reparam("apply", "spec.yaml", rewritten, "-o", "again.pt2", "--json")
    assert again.code == 0
    assert all(site["present"] for site in again.json["sites"])
    assert reparam("diff", rewritten, "again.pt2", "--json").json["equal"] is True
    (folder / "other.yaml").write_text((folder / "spec.yaml").read_text().replace("symmetric", "skew"))
    refused = reparam("plan", "other.yaml", rewritten)
    assert refused.code == 4
    assert "already parametrized" in refused.err


def test_part_of_a_program_bakes_by_rule_name_or_label(reparam, folder, program):
    (folder / "labelled.yaml").write_text(LABELLED)
    assert reparam("apply", "labelled.yaml", program, "-o", "labelled.pt2").code == 0
    for pattern, baked in [("one", "0.weight"), ("2.*", "2.weight"), ("even", "0.weight")]:
        part = reparam("bake", "labelled.pt2", "-o", "part.pt2", "--force", "--no-verify", "--only", pattern, "--json")
        assert part.json["baked"] == [baked]
    step = reparam("bake", "labelled.pt2", "-o", "step.pt2", "--no-verify", "--only", "half")
    assert step.code == 4
    assert "whole chains" in step.err
    assert reparam("plan", "labelled.yaml", "labelled.pt2", "--json").json["sites"][0]["present"] is True


def test_check_does_not_advance_a_training_program(reparam, folder):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    (folder / "spectral.yaml").write_text(
        "reparam: 1\nrules:\n  - {name: s, select: 0.weight, chain: [spectral_norm]}\n"
    )
    torch.export.save(torch.export.export(model, (X,)), "train.pt2")
    result = reparam("apply", "spectral.yaml", "train.pt2", "-o", "out.pt2", "--example", "float32[3,4]", "--json")
    assert result.code == 0, result.err
    assert result.json["checks"]["outputs"] is None
    (folder / "even.yaml").write_text("reparam: 1\nrules:\n  - {name: s, select: 0.weight, chain: [symmetric]}\n")
    result = reparam("apply", "even.yaml", "train.pt2", "-o", "even.pt2", "--example", "float32[3,4]", "--json")
    assert result.json["checks"]["outputs"] < 1e-5
    for name in ("out.pt2", "even.pt2"):
        assert torch.equal(load_model(name, trust=True).state_dict["1.running_mean"], torch.zeros(4))
        assert load_model(name, trust=True).state_dict["1.num_batches_tracked"] == 0


def test_format_follows_the_suffix_of_the_output(reparam, rewritten):
    assert reparam("bake", rewritten, "-o", "plain", "--no-verify").code == 0
    assert isinstance(load_model("plain", trust=True), torch.export.ExportedProgram)
    weights = reparam("bake", rewritten, "-o", "weights.safetensors", "--json")
    assert weights.json["format"] == "safetensors"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("apply", "spec.yaml", "model.pt2", "-o", "out.pt"), 6, "saved as .pt2, not .pt"),
        (("apply", "spec.yaml", "model.pt", "-o", "out.pt2"), 6, "saved as .pt"),
        (("bake", "model.pt2", "-o", "out.pt"), 6, "saved as .pt2, not .pt"),
        (("bake", "model.pt2", "-o", "out.pt2", "--format", "module"), 4, "format pt2"),
        (("bake", "model.pt2", "-o", "out.pt2", "--only", "nothing"), 4, "'nothing'"),
        (("plan", "spec.yaml", "model.pt2", "--capture", "graph"), 4, "'auto', not 'graph'"),
        (("plan", "spec.yaml", "model.pt2", "--capture", "module"), 4, "'auto', not 'module'"),
        (("plan", "spec.yaml", "model.pt2", "--model", "their_code:make"), 6, "leave the model factory out"),
        (("apply", "spec.yaml", "model.pt2", "-o", "out.pt2", "--example", "float32[3,5]"), 4, "example inputs"),
        (("apply", "spec.yaml", "model.pt2", "-o", "model.pt2"), 6, "--force"),
        (("plan", "nomatch.yaml", "model.pt2"), 4, "nomatch.yaml:3:"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_options_that_do_not_fit_a_program_are_refused(reparam, folder, program, arguments, code, message):
    (folder / "nomatch.yaml").write_text("reparam: 1\nrules:\n  - {name: a, select: 'x.y', chain: [symmetric]}\n")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    result = reparam(*arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert reparam(*arguments, "--json").json["error"]["exit_code"] == code
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == files


def test_export_capture_of_a_program_is_the_program(reparam, program):
    assert reparam("plan", "spec.yaml", program, "--capture", "export").code == 0


def test_tied_tensors_of_a_program_are_one_site(reparam, folder):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    torch.export.save(torch.export.export(model, (X,)), "tied.pt2")
    (folder / "tied.yaml").write_text("reparam: 1\nrules:\n  - {name: t, select: 1.weight, chain: [symmetric]}\n")
    applied = reparam("apply", "tied.yaml", "tied.pt2", "-o", "out.pt2", "--json")
    assert [site["names"] for site in applied.json["sites"]] == [["0.weight", "1.weight"]]
    assert reparam("bake", "out.pt2", "-o", "out.safetensors").code == 0
    assert list(pytest.importorskip("safetensors.torch").load_file("out.safetensors")) == ["0.weight"]


def test_bake_takes_the_chains_out_of_an_exported_module(reparam, rewritten_module):
    result = reparam("bake", rewritten_module, "-o", "baked.pt2", "--no-verify", "--json")
    assert result.json["baked"] == ["0.weight", "2.weight"], result.err
    assert not [name for name in load_model("baked.pt2", trust=True).state_dict if "parametrizations" in name]
