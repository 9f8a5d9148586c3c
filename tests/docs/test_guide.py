"""The code of docs/guide.md runs, block after block, in one session and one folder."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rewriter.cli import main
from rewriter.parametrizations import _registry
from rewriter.testing import check_parametrization

PAGE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)


LAWFUL: dict[str, dict[str, Any]] = {
    "Positive": {},
    "bounded": {},
    "Polar": {},
    "smoothed": {},
    "noisy": {},
    "factor": {"factor": 2.0},
}
"""What the guide shows as good keeps the laws that it teaches."""


def run_commands(text: str) -> None:
    for line in text.splitlines():
        command, *arguments = line.split()
        assert command == "reparam", line
        sys.argv = ["reparam", *arguments]
        try:
            main()
        except SystemExit as end:
            assert not end.code, line


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["reparam"])
    _registry.names()  # the catalog registers when it is first asked for
    monkeypatch.setattr(_registry, "_registered", dict(_registry._registered))
    monkeypatch.delitem(sys.modules, "constraints", raising=False)
    page = type(sys)("guide")
    monkeypatch.setitem(sys.modules, "guide", page)
    names: dict[str, Any] = page.__dict__
    blocks = list(BLOCK.finditer(PAGE))
    assert len(blocks) == PAGE.count("\n```") / 2
    for block in blocks:
        language, title, text = block.groups()
        if title:
            Path(title).write_text(text)
        elif language == "bash":
            run_commands(text)
        else:
            assert language == "python"
            # Errors are shown at the guide's own lines, and TorchScript finds the source.
            line = PAGE[: block.start(3)].count("\n")
            file = tmp_path / f"guide_line_{line + 1}.py"
            file.write_text("\n" * line + text)
            exec(compile("\n" * line + text, str(file), "exec"), names)
    for name, arguments in LAWFUL.items():
        check_parametrization(names.get(name, name), (4, 4), arguments=arguments)
    sys.modules.pop("constraints", None)
