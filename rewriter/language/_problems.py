"""Problems of a spec, collected for one SpecError."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from rewriter.errors import Diagnostic, SpecError
from rewriter.language._document import Document, Key, Location

MOST_REPORTED = 100
"""Problems that one error shows; the others are counted."""

_MOST_COMPARED = 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with the value (or the key) at `path`.

    Arguments:
        hint: what to do about it.
        word: what was written instead of one of `choices`; the nearest choices become the hint.
        on_key: the key itself is wrong.
    """

    path: tuple[Key, ...]
    message: str
    hint: str = ""
    word: str = ""
    choices: Sequence[str] = ()
    on_key: bool = False

    def where(self, document: Document) -> Location:
        return document.locate(self.path, key=self.on_key)

    def diagnose(self, document: Document) -> Diagnostic:
        near = nearest(self.word, self.choices) if self.word else ""
        return self.where(document).diagnose(self.message, near or self.hint)


def raise_all(document: Document, problems: Iterable[Problem]) -> None:
    """Raise everything found in a document in the order of its text; do nothing if nothing was found."""

    def place(found: Location | Diagnostic) -> tuple[int, int]:
        return found.line or 0, found.column or 0

    found = sorted(problems, key=lambda problem: place(problem.where(document)))
    # A hint compares a word with every name there is, so only problems that are shown are diagnosed.
    shown = [*document.problems, *(problem.diagnose(document) for problem in found[:MOST_REPORTED])]
    diagnostics = sorted(shown, key=place)[:MOST_REPORTED]
    left = len(document.problems) + len(found) - len(diagnostics)
    if left:
        diagnostics.append(Diagnostic(f"and {left} more problems", document.file))
    if diagnostics:
        raise SpecError(diagnostics)


def invalid(problems: Iterable[Problem]) -> ValidationError:
    """Return what a validator raises for problems; their paths start at the value that it validates."""
    return ValidationError.from_exception_data("value", [
        InitErrorDetails(
            type=PydanticCustomError("problem", "{message}", {"message": problem.message, "problem": problem}),
            loc=problem.path,
            input=None,
        )
        for problem in problems
    ])  # fmt: skip


def choices_of(error: ErrorDetails) -> list[str]:
    """Return the texts that a key with a closed list of values allows."""
    context = error.get("ctx", {})
    choices: list[str] = context.get("choices") or re.findall(r"'([^']*)'", str(context.get("expected", "")))
    return choices


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the near misses of `word`, or nothing."""
    folded = {choice.casefold(): choice for choice in islice(choices, _MOST_COMPARED)}
    near = difflib.get_close_matches(word.casefold()[:100], folded, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(folded[match]) for match in near)}?" if near else ""


def describe(value: Any) -> str:
    """Return what was found, as people call it.

    >>> describe("on"), describe(True), describe({}), describe(None)
    ("'on'", 'true', 'a mapping', 'nothing')
    """
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, float) or abs(value) < 10**20 else "a huge number"
    names: dict[type, str] = {type(None): "nothing", list: "a list", tuple: "a list", dict: "a mapping"}
    known = next((name for kind, name in names.items() if isinstance(value, kind)), "")
    return known or f"an object of class {type(value).__name__}"
