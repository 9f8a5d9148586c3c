"""What the main commands print on a terminal of 80 columns, as files.

``UPDATE_GOLDEN=1 python -m pytest tests/cli/test_golden.py`` replaces the files with the present output. Look at the
difference before you commit it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
SPEC = """\
reparam: 1
rules:
  - name: recurrent-kernel
    select: "*.weight_hh"
    chain: [{orthogonal: {map: cayley}}]
  - name: head
    select: {module: torch.nn.Linear, tensor: weight}
    chain: [symmetric, {scale: {factor: 0.5}}]
"""
COMMANDS = {
    "validate-help": ["validate", "--help"],
    "validate": ["validate", "spec.yaml"],
    "validate-wrong": ["validate", "wrong.yaml"],
    "plan": ["plan", "spec.yaml", "model.pt"],
    "explain": ["explain", "spec.yaml", "model.pt", "0.weight_hh"],
    "inspect": ["inspect", "new.pt"],
    "draw": ["draw", "new.pt"],
    "diff": ["diff", "model.pt", "new.pt"],
    "catalog-member": ["catalog", "orthogonal"],
    "usage": ["inspekt", "model.pt"],
}


@pytest.fixture
def terminal(folder, monkeypatch, reparam):
    """A working folder, and a terminal of 80 columns without colours."""
    for name, value in {"COLUMNS": "80", "TERM": "dumb", "TTY_COMPATIBLE": "1", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)
    (folder / "spec.yaml").write_text(SPEC)
    (folder / "wrong.yaml").write_text(SPEC.replace("cayley", "caley").replace("tensor:", "tensr:"))
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.RNNCell(3, 4), nn.Tanh(), nn.Linear(4, 4)), folder / "model.pt")
    assert reparam("apply", "spec.yaml", "model.pt", "-o", "new.pt").code == 0
    return reparam


@pytest.mark.parametrize("name", COMMANDS)
def test_output_at_80_columns_is_as_in_the_file(terminal, name):
    result = terminal(*COMMANDS[name])
    shown = "\n".join(line.rstrip() for line in f"{result.out}{result.err}".splitlines()) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(shown, encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8")
