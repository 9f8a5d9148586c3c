"""The benchmarks run and write their tables. No test checks a measured time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._measure import Spread
from benchmarks._report import Bound, Row
from benchmarks._summary import END, START, readme_table, summary

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"


@pytest.mark.slow
def test_a_quick_run_writes_the_report_and_the_tables(tmp_path: Path) -> None:
    options = ["--quick", "--only", "micro_batches", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(RUN), *options], check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    (group,) = report["benchmarks"]["cpu, 1 thread"]
    rows = {(row["name"], row["against"]): row for row in group["rows"]}
    assert rows["matrix_exp: evaluate_once", "torch uncached"]["measured"]["median"] > 0
    assert rows["matrix_exp: evaluate_once", "torch uncached"]["verdict"] == ""
    assert {"torch", "threads", "device"} <= report["environment"]["cpu, 1 thread"].keys()
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| matrix_exp: evaluate_once | speed | torch uncached |" in page


@pytest.mark.parametrize(
    ("samples", "bound", "verdict"),
    [
        ([1.4, 1.5, 1.6] * 20, Bound(low=1.3), "holds"),
        ([1.4, 1.5, 1.6] * 20, Bound(low=1.7), "fails"),
        ([0.98, 0.99, 1.02] * 3, Bound(low=1.0), "even"),
        ([0.98, 0.99, 0.995] * 30, Bound(low=1.0), "fails"),
        ([0.96, 0.98, 1.0, 1.02] * 9, Bound(low=0.97, high=1.03), "holds"),
        ([0.96, 0.98, 1.0, 1.02] * 9, Bound(low=0.991, high=1.03), "even"),
        ([0.5], Bound(high=0.2), "fails"),
        ([1.0], None, ""),
    ],
)
def test_a_row_is_even_where_the_measurement_cannot_tell(
    samples: list[float], bound: Bound | None, verdict: str
) -> None:
    assert Row("work", "speed", "other", bound, Spread.of(samples)).verdict == verdict


def test_a_condition_that_does_not_hold_fails_the_row() -> None:
    row = Row("work", "time", "plain", Bound(high=1.0), Spread.of([0.5]), also=("same graph", False))
    assert row.verdict == "fails"


def test_the_summary_shows_the_works_that_were_measured() -> None:
    seconds = {name: {"median": time} for name, time in (("plain", 0.01), ("graph", 0.0084), ("torch cached", 0.018))}
    group = {"title": "Unrolled RNN, one training step", "seconds": {"householder": seconds, "unnamed": seconds}}
    head, rule, row = summary([group]).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    assert row.endswith("| **8.4** | 10 | – | – | 18 |")
    assert summary([]) == ""


def test_the_table_of_readme_is_that_of_the_stored_results() -> None:
    readme = (RUN.parents[1] / "README.md").read_text()
    report = json.loads((RUN.parent / "report.json").read_text())
    assert readme.partition(START)[2].partition(END)[0] == readme_table(report)
