from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch.nn.utils.parametrizations
import torch.nn.utils.prune as prune

import rewriter
from rewriter.parametrizations._registry import find
from tests.members import members

TABLE = Path(__file__).parents[2] / "docs" / "catalog-coverage.md"
TEXT = TABLE.read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


THEIRS = {name for row in ROWS for name in quoted(row[0])}
OURS = sorted({name for row in ROWS for name in quoted(row[1])})


def test_every_name_of_torch_is_in_the_table() -> None:
    parametrizations = torch.nn.utils.parametrizations
    expected = {f"torch.nn.utils.parametrizations.{name}" for name in parametrizations.__all__}
    for name, value in vars(prune).items():
        if not name.startswith("_") and getattr(value, "__module__", "") == prune.__name__:
            expected.add(f"torch.nn.utils.prune.{name}")
    assert expected <= THEIRS, f"missing in {TABLE.name}: {sorted(expected - THEIRS)}"


def test_every_name_of_geotorch_is_in_the_table() -> None:
    geotorch = pytest.importorskip("geotorch")
    public = (name for name, value in vars(geotorch).items() if callable(value) and not name.startswith("_"))
    expected = {f"geotorch.{name}" for name in public}
    assert expected <= THEIRS, f"missing in {TABLE.name}: {sorted(expected - THEIRS)}"


def test_every_method_of_peft_is_in_the_table() -> None:
    tuners = importlib.util.find_spec("peft")
    if tuners is None or tuners.origin is None:
        pytest.skip("PEFT is not installed")
    folders = (Path(tuners.origin).parent / "tuners").glob("[a-z]*/")
    expected = {folder.name for folder in folders if (folder / "config.py").is_file()}
    assert expected <= THEIRS, f"missing in {TABLE.name}: {sorted(expected - THEIRS)}"


@pytest.mark.parametrize("name", OURS)
def test_every_name_on_our_side_exists(name: str) -> None:
    if name.startswith("rewriter."):
        assert name.removeprefix("rewriter.") in rewriter.__all__
        return
    if name.startswith("geotorch."):
        pytest.importorskip("geotorch")
    assert callable(find(name))


def test_every_registered_name_is_mentioned() -> None:
    missing = sorted(set(members()) - set(quoted(TEXT)))
    assert not missing, f"missing in {TABLE.name}: {missing}"


def test_a_row_without_an_equivalent_says_why() -> None:
    for row in ROWS:
        assert len(row) == 3, row
        if not quoted(row[1]):
            assert row[1] == "–", row
            assert row[2], row
