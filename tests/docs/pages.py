"""Run the code blocks of a Markdown page, from top to bottom, in one namespace and one folder.

The first word after the fence is the language. `python` runs, `bash` runs `reparam` and `python FILE`, `text` is not
run. Attributes:

* `title="FILE"` writes the block to FILE instead.
* `raises="TEXT"` and `warns="TEXT"` expect an error or a warning that contains TEXT.
* `needs="MODULE"` skips the block if MODULE is not installed.

A block after `<!-- ci: NAME -->` belongs to `.ci/run`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rewriter.cli import main
from rewriter.parametrizations import _registry

CHECKOUT = Path(__file__).parents[2]
PAGES = {path.stem: path for path in [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]}
_FENCE = re.compile(r"^(?P<ci><!-- ci: \w+ -->\n)?^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """One code block and the line on which its code starts."""

    language: str
    attributes: dict[str, str]
    text: str
    line: int


def blocks_of(page: str) -> Iterator[Block]:
    """Yield the blocks of a page that this module is responsible for."""
    for found in _FENCE.finditer(page):
        if not found["ci"]:
            language, _, attributes = found["info"].partition(" ")
            pairs = dict(re.findall(r'(\w+)="([^"]*)"', attributes))
            yield Block(language, pairs, found["text"], page[: found.start("text")].count("\n") + 1)


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a page in `folder`; return the namespace of its Python blocks."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["reparam"])
    _registry.names()  # The catalog registers its members on first use.
    monkeypatch.setattr(_registry, "_registered", dict(_registry._registered))
    module = type(sys)(f"page_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = set(sys.modules)
    try:
        for block in blocks_of(PAGES[name].read_text()):
            _run_block(block, folder, module.__dict__)
    finally:
        for added in set(sys.modules) - before:
            if str(getattr(sys.modules[added], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[added]
    return module.__dict__


def _run_block(block: Block, folder: Path, names: dict[str, Any]) -> None:
    needed, expected = block.attributes.get("needs"), block.attributes.get("raises")
    if needed and importlib.util.find_spec(needed) is None:
        return
    if "title" in block.attributes:
        (folder / block.attributes["title"]).write_text(block.text)
    elif block.language == "bash":
        for line in block.text.splitlines():
            _run_command(line, expected)
    elif block.language == "python":
        # TorchScript reads the source of a class from a file; the blank lines give errors the page's line numbers.
        source = "\n" * (block.line - 1) + block.text
        file = folder / f"line_{block.line}.py"
        file.write_text(source)
        code = compile(source, str(file), "exec")
        if "warns" in block.attributes:
            with pytest.warns(UserWarning, match=re.escape(block.attributes["warns"])):
                exec(code, names)
            return
        if expected is None:
            exec(code, names)
            return
        with pytest.raises(Exception) as problem:
            exec(code, names)
        assert expected in str(problem.value), f"line {block.line}: {problem.value}"
    else:
        assert block.language in ("text", "yaml"), f"line {block.line}: nothing runs a block of {block.language!r}"


def _run_command(line: str, expected: str | None) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "python":
        runpy.run_path(words[1], run_name="__main__")
        return
    assert words[0] == "reparam", line
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        main(words[1:])
    if expected is None:
        assert not ended.value.code, f"{line}: {errors.getvalue()}"
    else:
        assert ended.value.code, line
        assert expected in errors.getvalue(), f"{line}: {errors.getvalue()}"
