"""The commands that write no file: schema, catalog, inspect, explain, diff, draw."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture
def rewritten(reparam, folder):
    assert reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt").code == 0
    return folder / "rewritten.pt"


def test_schema_accepts_the_example(reparam, folder):
    jsonschema = pytest.importorskip("jsonschema")
    yaml = pytest.importorskip("yaml")
    schema = reparam("schema").out
    assert reparam("schema", "--json").json == __import__("json").loads(schema)
    jsonschema.validate(yaml.safe_load((folder / "spec.yaml").read_text()), reparam("schema", "--json").json)


def test_catalog_lists_and_describes(reparam):
    listed = reparam("catalog", "--json").json["parametrizations"]
    assert {"orthogonal", "symmetric", "mask"} <= {entry["name"] for entry in listed}
    assert "symmetric" in reparam("catalog").out
    assert "transpose" in reparam("catalog", "symmetric").out
    assert reparam("catalog", "symmetric", "--json").json["right_inverse"] is True
    unknown = reparam("catalog", "symetric")
    assert unknown.code == 2
    assert "'symmetric'" in unknown.err


def test_inspect_lists_chains_and_rules(reparam, rewritten):
    tensors = {tensor["names"][0]: tensor for tensor in reparam("inspect", rewritten, "--json").json["tensors"]}
    assert list(tensors) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert tensors["0.weight"]["chain"] == ["symmetric"]
    assert tensors["0.weight"]["rule"] == "even"
    assert tensors["0.bias"]["chain"] is None
    assert "4 tensors, 2 of them computed" in reparam("inspect", rewritten).out


def test_inspect_reads_exported_programs(reparam, folder):
    torch.export.save(torch.export.export(nn.Linear(4, 2), (torch.ones(1, 4),)), folder / "model.pt2")
    assert reparam("inspect", "model.pt2").code == 6
    result = reparam("inspect", "model.pt2", "--json", "--trust")
    assert [tensor["names"] for tensor in result.json["tensors"]] == [["weight"], ["bias"]]


@pytest.mark.parametrize("per", ["", "per: {dim: 0, chunks: 4}, "])
def test_stacked_gates_get_a_hint(reparam, folder, per):
    torch.save(nn.LSTM(3, 4), "lstm.pt")
    rule = f"{{name: gates, select: weight_hh_l0, {per}chain: [orthogonal]}}"
    (folder / "gates.yaml").write_text(f"reparam: 1\nrules:\n  - {rule}\n")
    for command in ("plan gates.yaml lstm.pt", "explain gates.yaml lstm.pt weight_hh_l0"):
        shown = reparam(*command.split()).out
        assert ("the whole 16×4 matrix, which stacks 4 gates, is made orthogonal" in shown) == (not per)
        assert ("add `per: {dim: 0, chunks: 4}` to the rule" in shown) == (not per)


def test_explain_names_the_rule_and_the_reason(reparam, folder):
    (folder / "spec.yaml").write_text(
        "reparam: 1\nrules:\n"
        "  - {name: all, select: '*.weight', except: ['2.*'], chain: [symmetric]}\n"
        "  - {name: first, select: ['x', '0.weight'], overrides: [all], expect: '0..', chain: [skew]}\n"
    )
    first = reparam("explain", "spec.yaml", "model.pt", "0.weight", "--json").json
    assert first["owners"] == ["first"]
    assert "rule 'first' overrides it" in first["rules"][0]["why"]
    assert "select 0.weight matches; it becomes skew" in first["rules"][1]["why"]
    second = reparam("explain", "spec.yaml", "model.pt", "2.weight").out
    assert "no rule owns it" in second
    assert "except 2.* takes it out" in second
    unknown = reparam("explain", "spec.yaml", "model.pt", "2.wieght")
    assert unknown.code == 4
    assert "'2.weight'" in unknown.err


def test_diff_reports_values_forms_and_chains(reparam, folder, rewritten):
    torch.save(nn.Sequential(nn.Linear(4, 3)), folder / "other.pt")
    assert reparam("diff", "model.pt", "model.pt", "--json").json["equal"] is True
    assert "0.weight  form" in reparam("diff", "model.pt", "other.pt").out
    changed = reparam("diff", "model.pt", rewritten, "--json").json
    assert changed["equal"] is False
    assert {row["name"]: row["detail"] for row in changed["chains"]} == {
        "0.weight": "plain → symmetric",
        "2.weight": "plain → symmetric",
    }
    reparam("bake", rewritten, "-o", "baked.pt")
    rows = {row["name"]: row["change"] for row in reparam("diff", "model.pt", "baked.pt", "--json").json["tensors"]}
    assert rows == {"0.weight": "values", "0.bias": "equal", "2.weight": "values", "2.bias": "equal"}


def test_draw_prints_the_chain(reparam, rewritten):
    assert "evaluate 0.weight: original >> symmetric" in reparam("draw", rewritten).out
    assert reparam("draw", "model.pt", "--json").json["graph"][0] == "%1 = input"


def test_draw_of_a_plain_model_that_cannot_be_traced_says_what_to_do(reparam, folder):
    torch.save(nn.LSTM(3, 4), "lstm.pt")
    refused = reparam("draw", "lstm.pt")
    assert refused.code == 4
    assert "cannot trace the LSTM: its forward depends on data. reparam inspect lists its tensors" in refused.err


def test_bare_weights_are_inspected_and_compared_without_a_model(reparam, folder):
    plain = torch.load("model.pt", weights_only=False)
    torch.save({"state_dict": plain.state_dict(), "epoch": 1}, "weights.pt")
    listed = reparam("inspect", "weights.pt", "--json").json
    assert listed["class"] == "weights"
    assert [(row["names"], row["shape"]) for row in listed["tensors"]][:2] == [
        (["0.weight"], [4, 4]),
        (["0.bias"], [4]),
    ]
    assert "4 tensors equal, 0 not" in reparam("diff", "weights.pt", "model.pt").out
    with torch.no_grad():
        plain[0].bias += 1
    torch.save(plain.state_dict(), "other.pt")
    assert "0.bias  values  largest difference 1.00e+00" in reparam("diff", "weights.pt", "other.pt").out
    assert "say whose (--model" in reparam("plan", "spec.yaml", "weights.pt").err


def test_diff_says_whether_a_rewritten_and_a_baked_model_have_the_same_values(reparam, folder, rewritten):
    assert reparam("bake", rewritten, "-o", "baked.pt").code == 0
    same = reparam("diff", rewritten, "baked.pt")
    assert "computed values: 2 agree, 0 differ\n" in same.out
    moved = reparam("diff", rewritten, "model.pt", "--json").json
    assert [(row["name"], row["agree"]) for row in moved["values"]] == [("0.weight", False), ("2.weight", False)]
    differ = reparam("diff", rewritten, "model.pt").out
    assert "computed values: 0 agree, 2 differ: 0.weight (largest difference" in differ
