"""The site has every page in its navigation, and its fences are those of Markdown."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

from tests.docs.pages import CHECKOUT, PAGES, blocks_of


def test_the_navigation_has_every_page_once() -> None:
    nav: list[Any] = yaml.safe_load((CHECKOUT / "mkdocs.yml").read_text())["nav"]
    pages = [page for entry in nav for page in ([entry] if isinstance(entry, str) else next(iter(entry.values())))]
    assert sorted(pages) == sorted(path.name for path in (CHECKOUT / "docs").glob("*.md"))


def test_fences_of_the_site_have_no_attributes_but_titles() -> None:
    spec = importlib.util.spec_from_file_location("site_hooks", Path(CHECKOUT / "docs" / "site_hooks.py"))
    assert spec is not None and spec.loader is not None
    hooks: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    for path in PAGES.values():
        for block in blocks_of(hooks.on_page_markdown(path.read_text())):
            assert block.attributes.keys() <= {"title"}
