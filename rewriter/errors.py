"""Every error that reparam raises on purpose, under one base class."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MOST_NAMES = 20
"""How many names a message lists."""


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with every character that a terminal does not show as itself written as ``\uXXXX``.

    Names from a file go through it: control characters could rewrite or hide what a terminal shows.

    >>> printable("a\x1b[2Kb"), printable("a\nb\t", keep="\n")
    ('a\\u001b[2Kb', 'a\nb\\t')
    """
    return "".join(mark if mark.isprintable() or mark in keep else json.dumps(mark)[1:-1] for mark in text)


def listing(names: Sequence[str]) -> str:
    """Return the names as a list in words, shortened where it is long.

    >>> listing(["0.weight", "1.weight"])
    '0.weight, 1.weight'
    """
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


class RewriterError(Exception):
    """Base of all errors of this package; its message says where, what was found and what to do."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One problem of a spec: where it is and what to do about it.

    Arguments:
        message: what was found, what was expected.
        file: the spec's path, or ``"<spec>"`` for text and mappings.
        line: 1-based line; ``None`` for a mapping given from Python, which has no text.
        column: 1-based column; ``None`` likewise.
        path: where it is inside the document, such as ``rules[2].chain[0].orthogonal.map``.
        source: the line of the spec itself, for the caret.
        hint: "did you mean …", or what else to do; may be empty.
    """

    message: str
    file: str = "<spec>"
    line: int | None = None
    column: int | None = None
    path: str = ""
    source: str | None = None
    hint: str = ""

    def __str__(self) -> str:
        if self.line is None:
            where = f"{self.file}: {self.path}" if self.path else self.file
        else:
            where = f"{self.file}:{self.line}:{self.column}"
        lines = [f"{where}: {self.message}"]
        if self.source is not None and self.line is not None:
            margin = f"{self.line:>5} | "
            lines.append(margin + self.source)
            lines.append(" " * (len(margin) - 2) + "| " + " " * ((self.column or 1) - 1) + "^")
        if self.hint:
            lines.append(f"      {self.hint}")
        return "\n".join(lines)


class SpecError(RewriterError):
    """A spec that cannot be read; carries every problem found, in the order of the text."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        self.diagnostics: tuple[Diagnostic, ...] = tuple(diagnostics)
        super().__init__("\n".join(str(diagnostic) for diagnostic in self.diagnostics))

    def __reduce__(self) -> tuple[type[SpecError], tuple[tuple[Diagnostic, ...]]]:
        return (SpecError, (self.diagnostics,))


class PlanError(RewriterError):
    """A spec that is well formed and does not fit the model; `diagnostics` lists every problem that has a place."""

    def __init__(self, message: str, diagnostics: Sequence[Diagnostic] = ()) -> None:
        self.diagnostics: tuple[Diagnostic, ...] = tuple(diagnostics)
        super().__init__(message)

    @classmethod
    def of(cls, diagnostics: Sequence[Diagnostic]) -> PlanError:
        """Return one error that reports all of `diagnostics`."""
        return cls("\n".join(str(diagnostic) for diagnostic in diagnostics), diagnostics)

    def __reduce__(self) -> tuple[type[PlanError], tuple[str, tuple[Diagnostic, ...]]]:
        return (PlanError, (str(self), self.diagnostics))


class CaptureError(RewriterError):
    """A module whose use of its tensors could not be captured."""


class ModelFileError(RewriterError):
    """A model file that cannot be read, is not trusted, or would be overwritten."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message, keep="\n"))


class WeightsError(ModelFileError):
    """A file of weights without their model, or whose weights do not fit it: they may fit it once it is rewritten.

    Arguments:
        message: what to do.
        module: the model, if there is one.
        weights: the state dict.
    """

    def __init__(self, message: str = "", module: Any = None, weights: Any = None) -> None:
        super().__init__(message)
        self.module, self.weights = module, weights


class NumericError(RewriterError):
    """A rewritten model whose values differ from those they must equal."""
