"""A newcomer's path by docs/tutorial.md alone: its files and commands in an empty folder, each in a process of its own.

`.ci/run` runs this in a new environment, in which README's command installed reparam.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import CHECKOUT, PAGES, blocks_of

BLOCKS = list(blocks_of(PAGES["tutorial"].read_text()))


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command, *words = shlex.split(line)
    known = {"reparam": [sys.executable, "-m", "rewriter"], "python": [sys.executable]}
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*known[command], *words], capture_output=True, text=True, cwd=folder, env=environment, timeout=200
    )


@pytest.mark.slow
def test_a_newcomer_reaches_a_served_file_by_the_tutorial(tmp_path: Path) -> None:
    shown, done = {}, run("reparam --version", tmp_path)
    for block in BLOCKS:
        needed, expected = block.attributes.get("needs"), block.attributes.get("raises")
        if "title" in block.attributes:
            (tmp_path / block.attributes["title"]).write_text(block.text)
            continue
        if needed and importlib.util.find_spec(needed) is None:
            continue
        if block.language == "text":  # what the last command says
            assert block.text.strip() in done.stderr
            continue
        assert block.language == "bash", f"line {block.line}"
        for line in block.text.splitlines():
            done = run(line, tmp_path)
            assert (done.returncode != 0) == (expected is not None), f"{line}\n{done.stdout}{done.stderr}"
            assert "Traceback" not in done.stderr and (expected or "") in done.stderr
            shown[line] = done.stdout
    accuracy, norm = (float(part.split()[-1]) for part in shown["python train.py"].split(", "))
    assert accuracy > 0.9
    assert norm == pytest.approx(1.1, abs=0.2)
    assert "head.weight" in (tmp_path / "report.html").read_text()
    if "python serve.py" in shown:
        assert shown["python serve.py"] == "[0 1 2 3 4]\n"


def test_the_tutorial_has_each_step_and_three_mistakes() -> None:
    lines = [line.split()[:2] for block in BLOCKS if block.language == "bash" for line in block.text.splitlines()]
    for command in ("init", "plan", "apply", "report", "bake"):
        assert ["reparam", command] in lines
    assert ["python", "train.py"] in lines and ["python", "serve.py"] in lines
    assert sum("raises" in block.attributes for block in BLOCKS) == 3
