"""A short demo: every file exists, every number is measured, and later commands accept the files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import fx

if importlib.util.find_spec("sklearn") is None:  # its import takes a second in each process
    pytest.skip("needs scikit-learn", allow_module_level=True)

from rewriter.cli import main
from rewriter.demo import ARTEFACTS, PixelRNN, run_demo, table_of
from rewriter.errors import ModelFileError, RewriterError
from rewriter.io import load_model

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A demo with the smallest number of steps."""
    out = tmp_path_factory.mktemp("demo") / "artefacts"
    seen = []
    report = run_demo(out, seconds=1, progress=lambda part, done, total: seen.append((part, done, total)))
    return out, report, seen


def test_demo_writes_every_file(short):
    out, report, _ = short
    assert sorted(path.name for path in out.iterdir()) == sorted(ARTEFACTS)
    assert json.loads((out / "report.json").read_text()) == report.to_dict()
    assert isinstance(load_model(out / "rewritten.pt"), fx.GraphModule)
    assert type(load_model(out / "baked.pt")) is PixelRNN


def test_measurements_are_in_their_ranges(short):
    _, report, seen = short
    rewritten, plain, cached = report.rewritten, report.plain, report.cached
    assert (rewritten.evaluations, cached.evaluations, report.torch.evaluations) == (1, 1, 64)
    assert max(rewritten.orthogonality, cached.orthogonality) < 1e-4 < plain.orthogonality
    assert max(report.difference_baked, report.difference_scripted) < 1e-3
    # Both train the same function from the same start on the same batches.
    assert rewritten.accuracy == pytest.approx(cached.accuracy, abs=0.02)
    assert report.torch.step_seconds > cached.step_seconds > 0
    flat = report.to_dict()
    assert (flat["accuracy"], flat["accuracy_plain"]) == (rewritten.accuracy, plain.accuracy)
    assert flat["step_seconds_torch"] == report.torch.step_seconds and "accuracy_torch" not in flat
    assert [name for site in report.plan["sites"] for name in site["names"]] == ["cell.weight_hh"]
    assert {part for part, _, _ in seen} == {"with the spec", "without it", "with torch's parametrize"}
    assert seen[-1][1:] == (report.steps, report.steps)


def test_baked_and_scripted_files_equal_the_rewritten_one(short):
    out, _, _ = short
    images = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    logits = load_model(out / "rewritten.pt")(images)
    assert torch.allclose(load_model(out / "baked.pt")(images), logits, atol=1e-5)
    assert torch.allclose(torch.jit.load(out / "scripted.pt")(images), logits, atol=1e-5)


def test_bake_reads_the_rewritten_file(short, tmp_path):
    out, _, _ = short
    with pytest.raises(SystemExit) as ended:
        main(["bake", str(out / "rewritten.pt"), "-o", str(tmp_path / "plain.pt")])
    assert ended.value.code == 0
    assert torch.equal(load_model(tmp_path / "plain.pt").cell.weight_hh, load_model(out / "baked.pt").cell.weight_hh)


def test_files_are_not_overwritten(short):
    out, _, _ = short
    before = (out / "baked.pt").read_bytes()
    with pytest.raises(ModelFileError, match="--force"):
        run_demo(out, seconds=1)
    assert (out / "baked.pt").read_bytes() == before


def test_table_has_a_column_for_each_variant(short):
    from rich.console import Console

    _, report, _ = short
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table_of(report))
    text = captured.get()
    for name in ("reparam", "no spec", "torch, cached()", "torch, uncached"):
        assert name in text
    accuracies = next(line for line in text.splitlines() if "test accuracy" in line)
    assert accuracies.count("%") == 3


def test_spec_of_the_demo_is_the_recipe(short):
    out, _, _ = short
    assert (out / "orthogonal_rnn.yaml").read_text() == (CHECKOUT / "specs" / "orthogonal_rnn.yaml").read_text()


def test_missing_scikit_learn_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(RewriterError, match=r"pip install 'reparam\[demo\]'"):
        run_demo(tmp_path, seconds=1)


def test_command_prints_one_document(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--out", str(tmp_path / "out"), "--seconds", "1", "--json"])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["evaluations_torch"] == 64
    assert "reparam bake" in captured.err
