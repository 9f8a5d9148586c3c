"""Folding of repeated blocks in drawn graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriter import rewrite
from rewriter.cli._fold import folded
from tests.cli.conftest import reparam as reparam


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


def lines_of(batch):
    from rewriter.cli._draw import graph_lines

    model = nn.Sequential(*[Block() for _ in range(6)], nn.Linear(4, 4))
    rule = {"name": "n", "select": "**.weight", "chain": ["weight_norm"], "batch": batch}
    return graph_lines(rewrite(model, {"reparam": 1, "rules": [rule]}, capture="graph"))


@pytest.fixture
def lines():
    return lines_of("never")


def test_layers_whose_chains_run_as_a_batch_are_folded():
    lines = lines_of("always")
    shown = folded(lines)
    assert lines[1].count(", ") == 12 and shown[1].endswith("1.b.weight and 9 more")
    assert shown[-5] == "… 4 more like these 8 lines, to %50"


def test_equal_layers_are_shown_once(lines):
    shown = folded(lines)
    assert len(lines) == 1 + 6 * 8 + 4
    assert shown[1:9] == lines[1:9]
    assert shown[9] == "… 5 more like these 8 lines, to %49"
    assert shown[10:] == lines[49:]


def test_a_layer_that_differs_ends_the_run(lines):
    other = [line.replace("relu", "tanh") if line.startswith("%29 ") else line for line in lines]
    shown = folded(other)
    assert shown[9] == "… 2 more like these 8 lines, to %25"
    assert any("tanh" in line for line in shown)


@pytest.mark.parametrize(
    "differing",
    [
        ["%2 = relu(%1)", "%3 = relu(%1)", "%4 = relu(%2)"],
        ["%2 = a.0.w", "%3 = a.1.w", "%4 = a.3.w"],
        ["%2 = mul(%1, 2)", "%3 = mul(%2, 3)", "%4 = mul(%3, 4)"],
        ["%2 = relu(%1)", "%3 = relu(%2)"],
        [],
    ],
)
def test_what_differs_in_more_is_not_folded(differing):
    assert folded(differing) == differing


def test_the_command_folds_unless_it_is_told_otherwise(reparam, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(*[nn.ReLU() for _ in range(9)]), "model.pt")
    assert "… 8 more like this line, to %10" in reparam("draw", "model.pt").out
    assert "%10 = 8(%9)" in reparam("draw", "model.pt", "--full").out
    assert len(reparam("draw", "model.pt", "--json").json["graph"]) == 11
    reparam("draw", "model.pt", "-o", "graph.svg")
    assert "8 more like this line" in (tmp_path / "graph.svg").read_text()
