"""Problems of a spec, on their way to one SpecError."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from rewriter.errors import Diagnostic, SpecError
from rewriter.language._location import Key
from rewriter.language._source import MOST_REPORTED, Document

_MOST_COMPARED = 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with the value (or the key) at `path`.

    Arguments:
        hint: what to do about it.
        word: what was written where one of `choices` was expected; the nearest ones become the hint.
        on_key: the key itself is wrong.
    """

    path: tuple[Key, ...]
    message: str
    hint: str = ""
    word: str = ""
    choices: Sequence[str] = ()
    on_key: bool = False


def raise_all(document: Document, problems: Iterable[Problem]) -> None:
    """Raise everything found in a document in the order of its text, and do nothing for none."""
    found = list(problems)
    # A hint compares a word with every name there is, so only those that are shown are worked out.
    shown = sorted(found, key=lambda problem: _order(document, problem))[:MOST_REPORTED]
    diagnostics = [*document.problems, *(_diagnose(document, problem) for problem in shown)]
    diagnostics.sort(key=lambda diagnostic: (diagnostic.line or 0, diagnostic.column or 0))
    total = len(document.problems) + len(found)
    if total > MOST_REPORTED:
        more = Diagnostic(f"and {total - MOST_REPORTED} more problems", document.file)
        raise SpecError([*diagnostics[:MOST_REPORTED], more])
    if diagnostics:
        raise SpecError(diagnostics)


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the near misses of `word`, or nothing."""
    folded = {choice.casefold(): choice for choice in islice(choices, _MOST_COMPARED)}
    near = difflib.get_close_matches(word.casefold()[:100], folded, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(folded[match]) for match in near)}?" if near else ""


def _order(document: Document, problem: Problem) -> tuple[int, int]:
    location = document.locate(problem.path, key=problem.on_key)
    return (location.line or 0, location.column or 0)


def _diagnose(document: Document, problem: Problem) -> Diagnostic:
    location = document.locate(problem.path, key=problem.on_key)
    near = nearest(problem.word, problem.choices) if problem.word else ""
    return location.diagnose(problem.message, near or problem.hint)
