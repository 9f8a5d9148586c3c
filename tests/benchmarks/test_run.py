"""The benchmarks run and write their tables; what they measure is no matter of a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[2] / "benchmarks" / "run.py"


def test_a_quick_run_writes_the_report_and_the_tables(tmp_path: Path) -> None:
    options = ["--quick", "--only", "micro_batches", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(RUN), *options], check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    (group,) = report["benchmarks"]["cpu, 1 thread"]
    rows = {(row["name"], row["against"]): row for row in group["rows"]}
    assert rows["matrix_exp: evaluate_once", "torch uncached"]["measured"]["median"] > 0
    assert rows["matrix_exp: evaluate_once", "torch uncached"]["passed"] is None
    assert {"torch", "threads", "device"} <= report["environment"]["cpu, 1 thread"].keys()
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| matrix_exp: evaluate_once | speed | torch uncached |" in page
