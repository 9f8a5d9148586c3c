"""The commands on folders, indexes and safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rewriter.cli._init import Job
from tests.cli.conftest import reparam as reparam
from tests.streaming.conftest import read_folder, write_folder

SPEC = """\
reparam: 1
rules:
  - {name: even, select: "*.weight", chain: [symmetric]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a spec and a checkpoint of two shards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(SPEC)
    shards = [{"a.weight": torch.randn(4, 4)}, {"b.weight": torch.randn(4, 4), "b.bias": torch.randn(4)}]
    write_folder(tmp_path / "model", shards, config_json="{}")
    save_file(shards[0], tmp_path / "one.safetensors")
    (tmp_path / "own.py").write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(4, 4))\n")
    return tmp_path


def even(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor + tensor.mT) / 2


@pytest.mark.parametrize("given", ["model", "model/model.safetensors.index.json"])
def test_a_folder_and_its_index_are_rewritten_and_baked(reparam: Any, folder: Path, given: str) -> None:
    applied = reparam("apply", "spec.yaml", given, "-o", "stored", "--json")
    assert applied.code == 0, applied.err
    assert [site["name"] for site in applied.json["sites"]] == ["a.weight", "b.weight"]
    assert "a.parametrizations.weight.original" in read_folder(folder / "stored")
    baked = reparam("bake", "stored", "--spec", "spec.yaml", "-o", "plain", "--json", "--workers", 1)
    assert baked.json["baked"] == ["a.weight", "b.weight"]
    assert (folder / "plain/config.json").exists()
    found, before = read_folder(folder / "plain"), read_folder(folder / "model")
    torch.testing.assert_close(found, {**before, **{name: even(before[name]) for name in ("a.weight", "b.weight")}})


def test_a_file_gives_a_file(reparam: Any, folder: Path) -> None:
    assert reparam("bake", "one.safetensors", "--spec", "spec.yaml", "-o", "out.safetensors").code == 0
    before = load_file(folder / "one.safetensors")["a.weight"]
    torch.testing.assert_close(load_file(folder / "out.safetensors")["a.weight"], even(before))
    assert reparam("bake", "one.safetensors", "--spec", "spec.yaml", "-o", "out.safetensors").code == 6
    assert reparam("bake", "one.safetensors", "--spec", "spec.yaml", "-o", "out.safetensors", "--force").code == 0


@pytest.mark.parametrize("given", ["model", "one.safetensors"])
def test_a_spec_that_freezes_other_tensors_is_planned_and_applied(reparam: Any, folder: Path, given: str) -> None:
    (folder / "spec.yaml").write_text(SPEC.replace("rules:", "trainable: rewritten\nrules:").replace('"*', '"a'))
    assert reparam("plan", "spec.yaml", given).code == 0
    applied = reparam("apply", "spec.yaml", given, "-o", "stored" + Path(given).suffix, "--json")
    assert applied.code == 0, applied.err
    assert applied.json["frozen"] == []  # a checkpoint does not say what is trained


def test_plan_and_inspect_read_headers(reparam: Any, folder: Path) -> None:
    planned = reparam("plan", "spec.yaml", "model")
    assert "2 sites" in planned.out and "4×4" in planned.out
    # No value is read, so that nothing is known of how far it moves.
    assert [site["moved"] for site in reparam("plan", "spec.yaml", "model", "--json").json["sites"]] == [None, None]
    assert [one["shape"] for one in reparam("inspect", "model", "--json").json["tensors"]] == [[4, 4], [4], [4, 4]]


@pytest.mark.parametrize("job", get_args(Job))
def test_a_starter_spec_from_headers_plans_on_its_checkpoint(reparam: Any, folder: Path, job: str) -> None:
    for given in ("model", "one.safetensors"):
        made = reparam("init", given, "--for", job, "-o", "new.yaml", "--force")
        assert made.code == 0, made.err
        planned = reparam("plan", "new.yaml", given, "--json")
        assert planned.code == 0, planned.err
        assert [site["name"] for site in planned.json["sites"]] == ["a.weight", "b.weight"][: 1 + (given == "model")]
    assert "{tensor: weight, ndim: 2}  # embeddings, too" in (folder / "new.yaml").read_text()


def test_a_starter_spec_for_a_rewritten_checkpoint_is_refused(reparam: Any, folder: Path) -> None:
    assert reparam("apply", "spec.yaml", "model", "-o", "stored").code == 0
    refused = reparam("init", "stored", "--for", "prune")
    assert refused.code == 4
    assert "a.weight, b.weight: already computed by a chain; bake the checkpoint first" in refused.err


def test_a_module_selector_works_with_the_model(reparam: Any, folder: Path) -> None:
    save_file(nn.Sequential(nn.Linear(4, 4)).state_dict(), folder / "net.safetensors")
    (folder / "linear.yaml").write_text(SPEC.replace('"*.weight"', "{module: Linear, tensor: weight}"))
    refused = reparam("bake", "net.safetensors", "--spec", "linear.yaml", "-o", "out.safetensors")
    assert refused.code == 4
    assert "linear.yaml:3:26: rule 'even': select" in refused.err and "--model" in refused.err
    command = ("bake", "net.safetensors", "--spec", "linear.yaml", "-o", "out.safetensors", "--model", "own:make")
    assert reparam(*command).code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("bake", "model", "-o", "out"), 2, "--spec"),
        (("bake", "model", "--spec", "spec.yaml", "-o", "out", "--only", "even"), 2, "--only"),
        (("bake", "model", "--spec", "spec.yaml", "-o", "out", "--format", "onnx"), 2, "--format"),
        (("bake", "own.py", "--spec", "spec.yaml", "-o", "out"), 2, "has its chains with it"),
        (("bake", "missing", "--spec", "spec.yaml", "-o", "out"), 6, "does not exist"),
        (("bake", "missing.safetensors", "--spec", "spec.yaml", "-o", "out.safetensors"), 6, "does not exist"),
        (("bake", "one.safetensors", "--spec", "spec.yaml", "-o", "out.pt"), 6, "something.safetensors"),
        (("bake", "model", "--spec", "spec.yaml", "-o", "out.safetensors"), 6, "a folder of shards gives a folder"),
        (("bake", "model", "--spec", "spec.yaml", "-o", "model", "--force"), 6, "is or contains the input"),
        (("apply", "spec.yaml", "model", "-o", "out", "--capture", "graph"), 2, "--capture"),
        (("apply", "spec.yaml", "own.py", "-o", "out", "--resume"), 2, "--resume"),
        (("apply", "spec.yaml", "one.safetensors", "-o", "out.pt"), 6, "--model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_calls_say_what_to_do(reparam: Any, folder: Path, arguments: Any, code: int, message: str) -> None:
    before = sorted(folder.rglob("*"))
    result = reparam(*arguments)
    assert result.code == code, result.err
    assert message in result.err
    assert sorted(folder.rglob("*")) == before


CHAINS = ["symmetric", "weight_norm", "{lora: {r: 2, init_lora_weights: pissa}}", "per"]


@pytest.fixture(params=CHAINS, ids=str)
def rewritten(request: pytest.FixtureRequest, reparam: Any, folder: Path) -> str:
    """Rewrite the folder by a chain, and bake it; the chain on chunks is not recorded with all that it takes."""
    rule = SPEC.replace("symmetric", request.param)
    if request.param == "per":
        rule = SPEC.replace("chain:", "per: {dim: 0, chunks: 2}, chain:").replace("symmetric", "weight_norm")
    (folder / "spec.yaml").write_text(rule)
    assert reparam("apply", "spec.yaml", "model", "-o", "stored").code == 0
    assert reparam("bake", "stored", "--spec", "spec.yaml", "-o", "plain").code == 0
    return str(request.param)


def test_inspect_shows_the_chains_that_a_folder_records(reparam: Any, rewritten: str) -> None:
    tensors = reparam("inspect", "stored", "--json").json["tensors"]
    assert [(one["names"], one["kind"], one["shape"], one["dtype"]) for one in tensors] == [
        (["a.weight"], "computed", [4, 4], "float32"),
        (["b.bias"], "tensor", [4], "float32"),
        (["b.weight"], "computed", [4, 4], "float32"),
    ]
    chain = "weight_norm" if rewritten == "per" else rewritten.strip("{}").partition(":")[0]
    assert [one["chain"] and one["chain"][0].partition("(")[0] for one in tensors] == [chain, None, chain]
    assert "3 tensors, 2 of them computed" in reparam("inspect", "stored").out
    assert "3 tensors, 0 of them computed" in reparam("inspect", "plain").out


def test_diff_compares_a_rewritten_folder_with_a_baked_one(reparam: Any, folder: Path, rewritten: str) -> None:
    whole = read_folder(folder / "plain")
    whole["b.weight"][0, 0] += 1
    save_file(whole, folder / "moved.safetensors")
    known = () if rewritten != "per" else ("--spec", "spec.yaml")
    found = reparam("diff", "stored", "plain", "--json", *known).json
    assert found["classes"] == ["Checkpoint", "Checkpoint"] and not found["equal"]
    assert [(row["name"], row["agree"]) for row in found["values"]] == [("a.weight", True), ("b.weight", True)]
    assert [row["name"] for row in found["chains"]] == ["a.weight", "b.weight"]
    moved = reparam("diff", "moved.safetensors", "stored", "--json", *known).json
    assert [(row["name"], row["agree"]) for row in moved["values"]] == [("a.weight", True), ("b.weight", False)]
    assert reparam("diff", "stored", "stored", "--json").json["equal"]
    shown = reparam("diff", "stored", "plain").out
    assert ("values not compared: a.weight, b.weight" in shown) == bool(known)


def test_diff_compares_folders_with_files_of_weights(reparam: Any, folder: Path) -> None:
    torch.save(read_folder(folder / "model"), folder / "weights.pt")
    assert reparam("diff", "model", "weights.pt", "--json").json["equal"]
    (folder / "less").mkdir()
    save_file({"a.weight": torch.zeros(4, 5), "c": torch.zeros(1)}, folder / "less/model.safetensors")
    rows = reparam("diff", "model", "less", "--json").json["tensors"]
    assert {row["name"]: row["change"] for row in rows} == {
        "a.weight": "form",
        "b.weight": "only in the first",
        "b.bias": "only in the first",
        "c": "only in the second",
    }


def test_explain_reads_headers(reparam: Any, folder: Path) -> None:
    assert "a.weight: owned by even" in reparam("explain", "spec.yaml", "model", "a.weight").out
    assert "b.bias: no rule owns it" in reparam("explain", "spec.yaml", "model", "b.bias").out
    missing = reparam("explain", "spec.yaml", "model", "a.wieght")
    assert missing.code == 4 and "'a.weight'" in missing.err


@pytest.mark.parametrize("command", [("report", "model", "-o", "out.html"), ("draw", "model")], ids=" ".join)
def test_what_needs_a_model_says_what_works_on_a_folder(reparam: Any, folder: Path, command: Any) -> None:
    refused = reparam(*command)
    assert refused.code == 6
    assert "inspect, diff, init, plan, explain, apply, bake and merge" in refused.err
