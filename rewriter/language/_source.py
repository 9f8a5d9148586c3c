"""A spec's source, whatever it comes from, becomes one document: plain values and where each is written."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewriter.errors import Diagnostic, SpecError
from rewriter.language._location import Key, Location, dotted
from rewriter.language._unions import unfolded
from rewriter.language._yaml import DEEPEST, MOST_NODES, Composer, Mark, Node, Unreadable

LARGEST = 2**20
"""Bytes of text that are read."""

MOST_REPORTED = 100
"""Problems that one error shows; the others are counted."""

ANONYMOUS = "<spec>"
_LONGEST_LINE = 200
_SUFFIXES = (".yaml", ".yml", ".json")
_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Document:
    """What a source says (`data`), with the places and the problems of the text."""

    data: Any
    file: str = ANONYMOUS
    root: Node | None = None
    lines: Sequence[str] = ()
    problems: list[Diagnostic] = field(default_factory=list)

    def locate(self, path: tuple[Key, ...], *, key: bool = False) -> Location:
        """Return where the value at `path` is written, or the nearest value around it.

        Arguments:
            key: the place of the key in its mapping instead.
        """
        if self.root is None:
            return Location(self.file, path=dotted(path))
        node, mark = self.root, self.root.mark
        for depth, part in enumerate(path):
            child = node.child(part)
            if child is None:
                break
            last = depth == len(path) - 1
            mark = node.keys[str(part)] if key and last and node.keys is not None else child.mark
            node = child
        return _location(self.file, self.lines, mark, dotted(path))


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Document:
    """Read a path, YAML text or a mapping.

    Raises:
        SpecError: it cannot be read, or is no YAML.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if isinstance(source, os.PathLike):
        return _from_file(Path(source))
    if isinstance(source, str):
        return _from_file(Path(source)) if _names_file(source) else _from_text(source, ANONYMOUS)
    raise _unreadable(f"a spec is a path, YAML text or a mapping, not {type(source).__name__}", ANONYMOUS)


def _names_file(source: str) -> bool:
    if "\n" in source or "\0" in source or len(source) > 4096:
        return False
    return source.lower().endswith(_SUFFIXES) or _exists(source)


def _exists(source: str) -> bool:
    try:
        return bool(source) and Path(source).exists()
    except (OSError, ValueError):
        return False


def _from_file(path: Path) -> Document:
    name = str(path)
    try:
        if not path.exists():
            raise _unreadable("there is no such file", name)
        if path.is_dir():
            raise _unreadable("this is not a file but a directory", name)
        if not (path.is_file() or path.is_fifo()):
            raise _unreadable("this is not a file", name)
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except (OSError, ValueError) as wrong:
        raise _unreadable(f"the file cannot be read: {getattr(wrong, 'strerror', None) or wrong}", name) from wrong
    if len(raw) > LARGEST:
        raise _unreadable(f"the spec is larger than {LARGEST} bytes", name)
    try:
        return _from_text(raw.decode("utf-8"), name)
    except UnicodeDecodeError as wrong:
        before = raw[: wrong.start].decode("utf-8")
        where = f"byte 0x{raw[wrong.start]:02x} on line {len(_LINE_BREAK.split(before))}"
        hint = "a spec is YAML or JSON; is this the model's file?"
        raise _unreadable(f"the file is not UTF-8 text ({where})", name, hint) from wrong


def _from_text(text: str, file: str) -> Document:
    if len(text) > LARGEST or len(text.encode("utf-8", "replace")) > LARGEST:
        raise _unreadable(f"the spec is larger than {LARGEST} bytes", file)
    text = text.removeprefix("\ufeff")
    lines = _LINE_BREAK.split(text)
    composer = Composer()

    def diagnosed() -> list[Diagnostic]:
        return [_location(file, lines, mark, "").diagnose(message) for message, mark in composer.problems]

    try:
        _refuse_unprintable(text)
        root = composer.compose(text)
    except Unreadable as wrong:
        last = _location(file, lines, wrong.mark, "").diagnose(wrong.message, wrong.hint)
        raise SpecError([*diagnosed()[:MOST_REPORTED], last]) from None
    return Document(root.plain(), file, root, lines, diagnosed())


def _from_mapping(source: Mapping[Any, Any]) -> Document:
    problems: list[Diagnostic] = []
    copier = _Copier(problems)
    data = copier.copy(source, ())
    return Document(data, problems=problems)


class _Copier:
    """Copies what Python gave into plain dicts and lists, within the bounds that text has."""

    def __init__(self, problems: list[Diagnostic]) -> None:
        self.problems = problems
        self._spent = 0

    def copy(self, value: Any, path: tuple[Key, ...]) -> Any:
        self._spent += 1
        if len(path) > DEEPEST or self._spent > MOST_NODES:
            bound = f"nested more than {DEEPEST} deep" if len(path) > DEEPEST else f"more than {MOST_NODES} values"
            raise SpecError([Location(path=dotted(path[:3])).diagnose(bound)])
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    self._problem(path, f"a key must be text, found {key!r:.60}")
            return {key: self.copy(child, (*path, key)) for key, child in value.items() if isinstance(key, str)}
        if path[:1] == ("rules",) and path[2:] == ("chain",):
            value = unfolded(value)
        if isinstance(value, list | tuple):
            return [self.copy(child, (*path, index)) for index, child in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            self._problem(path, f"{value} is not a finite number")
        return value

    def _problem(self, path: tuple[Key, ...], message: str) -> None:
        self.problems.append(Location(path=dotted(path)).diagnose(message))


def _refuse_unprintable(text: str) -> None:
    found = _UNPRINTABLE.search(text)
    if found is not None:
        before = _LINE_BREAK.split(text[: found.start()])
        raise Unreadable(
            f"the character U+{ord(found[0]):04X} cannot stand in YAML text",
            (len(before) - 1, len(before[-1])),
        )


def _location(file: str, lines: Sequence[str], mark: Mark, path: str) -> Location:
    line, column = mark
    # A caret under the right character of a line of a megabyte helps nobody.
    source = lines[line] if line < len(lines) and len(lines[line]) <= _LONGEST_LINE else None
    return Location(file, line + 1, column + 1, path, source.replace("\t", " ") if source is not None else None)


def _unreadable(message: str, file: str, hint: str = "") -> SpecError:
    return SpecError([Diagnostic(message, file, hint=hint)])
