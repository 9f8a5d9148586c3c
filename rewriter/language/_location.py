"""Where something is written."""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.errors import Diagnostic

Key = str | int
"""One part of a place inside a document: a mapping's key or a sequence's index."""


def dotted(path: tuple[Key, ...]) -> str:
    """Return a path as people write it.

    >>> dotted(("rules", 0, "chain", 1, "my.Scale", "factor"))
    'rules[0].chain[1].my.Scale.factor'
    """
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a spec: ``spec.yaml:3:5``, or ``<spec> rules[0]`` for a mapping given from Python."""

    file: str = "<spec>"
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
