"""docs/api.md is what `docs/make_api.py` writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import rewriter

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_current_and_has_every_public_name() -> None:
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    assert spec is not None and spec.loader is not None
    maker: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    written = (DOCS / "api.md").read_text(encoding="utf-8")
    assert maker.page() == written, "run python docs/make_api.py"
    for module in (rewriter, rewriter.state, rewriter.io, rewriter.export, rewriter.testing):
        for name in module.__all__:
            assert f"### {module.__name__}.{name}\n" in written
