"""A spec's plain values, and where each of them is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rewriter.errors import Diagnostic

Key = str | int
"""One part of a path inside a document: a mapping's key or a list's index."""

Mark = tuple[int, int]
"""A place in a text: line and column, both from 0."""

ANONYMOUS = "<spec>"
_LONGEST_LINE = 200


def dotted(path: tuple[Key, ...]) -> str:
    """Return a path as people write it.

    >>> dotted(("rules", 0, "chain", 1, "my.Scale", "factor"))
    'rules[0].chain[1].my.Scale.factor'
    """
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


class MarkedDict(dict[str, Any]):
    """A mapping read from text, with the marks of its keys and of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.keys_at: dict[str, Mark] = {}
        self.values_at: dict[str, Mark] = {}


class MarkedTuple(tuple[Any, ...]):
    """A list read from text, with the marks of its entries."""

    values_at: list[Mark]


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a spec: ``spec.yaml:3:5``, or ``<spec> rules[0]`` for a mapping given from Python."""

    file: str = ANONYMOUS
    line: int | None = None
    column: int | None = None
    path: str = ""
    source: str | None = None

    def __str__(self) -> str:
        if self.line is not None:
            return f"{self.file}:{self.line}:{self.column}"
        return f"{self.file} {self.path}".rstrip()

    def diagnose(self, message: str, hint: str = "") -> Diagnostic:
        """Return a problem found at this place, with the spec's line and a caret."""
        return Diagnostic(message, self.file, self.line, self.column, self.path, self.source, hint)


@dataclass(frozen=True)
class Document:
    """What a source says, before anything is checked.

    Arguments:
        data: dicts, tuples and scalars; marked if they were read from text.
        mark: where the data start; ``None`` for a mapping given from Python.
        lines: of the text.
        problems: that did not stop the reading.
    """

    data: Any = None
    file: str = ANONYMOUS
    mark: Mark | None = None
    lines: Sequence[str] = ()
    problems: Sequence[Diagnostic] = field(default=(), compare=False)

    def locate(self, path: tuple[Key, ...], *, key: bool = False) -> Location:
        """Return where the value at `path` is written, or the nearest value around it.

        Arguments:
            key: return the place of the key, not of its value.
        """
        if self.mark is None:
            return Location(self.file, path=dotted(path))
        value, mark = self.data, self.mark
        for depth, part in enumerate(path, 1):
            of_key = key and depth == len(path) and isinstance(value, MarkedDict)
            marks = value.keys_at if of_key else getattr(value, "values_at", {})
            try:
                mark, value = marks[part], value[part]
            except (LookupError, TypeError):
                break
        return self.at(mark, dotted(path))

    def at(self, mark: Mark, path: str = "") -> Location:
        """Return the location of a mark; the line itself is left out if it is too long for a caret to help."""
        line, column = mark
        source = self.lines[line] if line < len(self.lines) else None
        if source is not None:
            source = source.replace("\t", " ") if len(source) <= _LONGEST_LINE else None
        return Location(self.file, line + 1, column + 1, path, source)
