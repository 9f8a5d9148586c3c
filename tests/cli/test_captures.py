"""The options --capture and --example of apply and plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriter.io import load_model

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))

DOUBLING = """
import torch
from torch import nn

class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
    def forward(self, x, y):
        return self.fc(x) + y
"""


@pytest.mark.parametrize("capture", ["auto", "graph", "module", "export"])
def test_every_capture_works(reparam, folder, capture):
    example = ("--example", "float32[3,4]")
    planned = reparam("plan", "spec.yaml", "model.pt", "--capture", capture, *example, "--json")
    assert planned.code == 0, planned.err
    assert planned.json["root"] == ("graph" if capture == "auto" else capture)
    assert all(site["capture"] for site in planned.json["sites"])
    applied = reparam("apply", "spec.yaml", "model.pt", "-o", "out.pt", "--capture", capture, *example, "--json")
    assert applied.code == 0, applied.err
    assert applied.json["checks"]["outputs"] < 1e-5
    reparam("bake", "out.pt", "-o", "baked.pt")
    assert torch.allclose(load_model("baked.pt")(X), load_model("out.pt")(X))


def test_each_input_needs_an_example(reparam, folder, monkeypatch):
    (folder / "doubling.py").write_text(DOUBLING)
    (folder / "fc.yaml").write_text("reparam: 1\nrules:\n  - {name: a, select: fc.weight, chain: [symmetric]}\n")
    monkeypatch.syspath_prepend(str(folder))
    import doubling

    torch.save(doubling.Doubling(), "doubling.pt")
    known = ("doubling.pt", "--allow", "doubling.Doubling", "--capture", "export")
    both = reparam("plan", "fc.yaml", *known, "--example", "float32[3,4]", "--example", "float32[3,1]", "--json")
    assert both.code == 0, both.err
    assert both.json["root"] == "export"
    one = reparam("plan", "fc.yaml", *known, "--example", "float32[3,4]")
    assert one.code == 4
    assert "'y'" in one.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--capture", "export"), 2, "--example float32[2,3]"),
        (("--example", "float32[3,5]"), 4, "fails on the example inputs"),
        (("--capture", "export", "--example", "float32[3,5]"), 4, "cannot capture Sequential"),
        (("--example", "float32[3,4"), 2, "float32[2,3,8]"),
        (("--example", "float33[3,4]"), 2, "float32[2,3,8]"),
        (("--example", "float32[99999999999999]"), 2, "no example input"),
        (("--example", "float32[99999999999999999999999]"), 2, "no example input"),
        (("--example", ""), 2, "float32[2,3,8]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_bad_captures_and_examples_are_refused(reparam, folder, arguments, code, message):
    for command in (("plan", "spec.yaml", "model.pt"), ("apply", "spec.yaml", "model.pt", "-o", "out.pt")):
        result = reparam(*command, *arguments)
        assert (result.code, result.out) == (code, "")
        assert message in result.err
    assert not (folder / "out.pt").exists()


def test_label_bakes_one_step(reparam, folder):
    (folder / "spec.yaml").write_text(
        "reparam: 1\nrules:\n"
        "  - {name: a, select: 0.weight, chain: [{weight_norm: {label: length}}, {symmetric: {label: half}}]}\n"
    )
    assert reparam("apply", "spec.yaml", "model.pt", "-o", "out.pt").code == 0
    assert "label" in reparam("bake", "--help").out
    result = reparam("bake", "out.pt", "-o", "part.pt", "--only", "length", "--json")
    assert result.code == 0, result.err
    assert result.json["left"] == ["0.weight"]
    chains = {t["names"][0]: t["chain"] for t in reparam("inspect", "part.pt", "--json").json["tensors"]}
    assert chains["0.weight"] == ["symmetric"]


def test_absorbed_tensors_are_checked_and_baked(reparam, folder):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    model[0].weight = model[0].weight.detach()
    torch.save(model, "pruned.pt")
    (folder / "absorb.yaml").write_text(
        "reparam: 1\nabsorb: true\nrules:\n  - {name: s, select: 1.weight, chain: [symmetric]}\n"
    )
    result = reparam("apply", "absorb.yaml", "pruned.pt", "-o", "new.pt", "--trust", "--json")
    assert result.code == 0, result.err
    assert result.json["checks"]["unmoved"] == 1
    assert reparam("bake", "new.pt", "-o", "plain.pt").code == 0
    plain = torch.load("plain.pt", weights_only=False)
    assert list(plain.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = torch.randn(2, 4)
    torch.testing.assert_close(plain[0](x), model[0](x))
    explained = reparam("explain", "absorb.yaml", "pruned.pt", "0.weight", "--trust")
    assert "0.weight: computed already, by torch.prune; the spec takes it over" in explained.out


def test_apply_captures_builds_and_proves_once(reparam, folder, monkeypatch):
    from rewriter.planning import _module_table, _prepare

    calls = []
    for place, name in ((_prepare, "_build_all"), (_prepare, "_proven"), (_module_table, "capture")):
        real = getattr(place, name)

        def counted(*args, real=real, name=name, **options):
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(place, name, counted)
    assert reparam("apply", "spec.yaml", "model.pt", "-o", "out.pt").code == 0
    assert sorted(calls) == ["_build_all", "_proven", "capture"]
