"""The code of every page runs, block after block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rewriter.testing import check_parametrization
from tests.docs.pages import PAGES, blocks_of, run_page

LAWFUL: dict[str, dict[str, Any]] = {
    "Positive": {},
    "bounded": {},
    "Polar": {},
    "smoothed": {},
    "noisy": {},
    "factor": {"factor": 2.0},
}
"""The classes that docs/guide.md recommends, with their arguments."""

RUNNABLE = [
    name
    for name, path in PAGES.items()
    if name != "tutorial"  # test_first_hour.py
    and any(block.language in ("python", "bash") for block in blocks_of(path.read_text()))
]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("serving", "migrate") else ()) for name in RUNNABLE],
)
def test_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_page(name, tmp_path, monkeypatch)
    if name == "guide":
        for kind, arguments in LAWFUL.items():
            check_parametrization(names.get(kind, kind), (4, 4), arguments=arguments)


@pytest.mark.parametrize("name", PAGES)
def test_every_fence_of_a_page_is_a_block(name: str) -> None:
    text = PAGES[name].read_text()
    marked = text.count("<!-- ci: ") if name == "README" else 0
    assert len(list(blocks_of(text))) + marked == text.count("\n```") / 2


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_to_files(name: str) -> None:
    import re

    page = PAGES[name]
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
