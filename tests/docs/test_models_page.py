"""The code of docs/models.md runs, block after block."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    page: Any = type(sys)("models_page")
    monkeypatch.setitem(sys.modules, "models_page", page)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, "docs/models.md", "exec"), page.__dict__)
    assert "evaluate cell.weight_hh: original >> orthogonal(map=cayley)" in capsys.readouterr().out
