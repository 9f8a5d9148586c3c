"""What mkdocs needs to show the pages and docstrings as a site; mkdocs.yml loads this file twice."""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^( *)>>> .*(?:\n(?! *\n).+)*", re.M)
_FOR_TESTS = re.compile(r'^(```\w+)(.*?)(?: (?:needs|raises|warns)="[^"\n]*")+', re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Remove the attributes of code blocks that only the tests read."""
    return _FOR_TESTS.sub(r"\1\2", markdown)


class Doctests(griffe.Extension):  # type: ignore[misc]
    """Fences the doctests of docstrings, which Markdown takes for quotations."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = _DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
