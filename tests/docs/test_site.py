"""The site has every page in its navigation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from tests.docs.pages import CHECKOUT


def pages_of(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from pages_of(inner)


def test_the_navigation_has_every_page_once() -> None:
    nav = yaml.safe_load((CHECKOUT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages_of(nav)) == sorted(path.name for path in (CHECKOUT / "docs").glob("*.md"))
