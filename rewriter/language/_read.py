"""A path, a text or a mapping becomes one document."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewriter.errors import Diagnostic, SpecError
from rewriter.language._document import ANONYMOUS, Document, Key, Location, dotted
from rewriter.language._forms import unfolded
from rewriter.language._problems import MOST_REPORTED
from rewriter.language._yaml import DEEPEST, MOST_NODES, Composer, Unreadable

LARGEST = 2**20
"""Bytes of text that are read."""

_SUFFIXES = (".yaml", ".yml", ".json")
_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Document:
    """Read a path, YAML text or a mapping.

    Raises:
        SpecError: the source cannot be read, or is not YAML.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if isinstance(source, os.PathLike):
        return _from_file(Path(source))
    if isinstance(source, str):
        return _from_file(Path(source)) if _names_file(source) else _from_text(source, ANONYMOUS)
    hint = '; write {"reparam": 1, "rules": […]}' if isinstance(source, list) else ""
    raise _unreadable(f"a spec is a path, YAML text or a mapping, not {type(source).__name__}{hint}", ANONYMOUS)


def _names_file(source: str) -> bool:
    if not source or "\n" in source or "\0" in source or len(source) > 4096:
        return False
    try:
        return source.lower().endswith(_SUFFIXES) or Path(source).exists()
    except (OSError, ValueError):
        return False


def _from_file(path: Path) -> Document:
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except FileNotFoundError as wrong:
        raise _unreadable("there is no such file", name) from wrong
    except (OSError, ValueError) as wrong:
        raise _unreadable(f"the file cannot be read: {getattr(wrong, 'strerror', None) or wrong}", name) from wrong
    if len(raw) > LARGEST:
        raise _unreadable(f"the spec is larger than {LARGEST} bytes", name)
    try:
        return _from_text(raw.decode("utf-8"), name)
    except UnicodeDecodeError as wrong:
        message = f"the file is not UTF-8 text: byte {wrong.start} is 0x{raw[wrong.start]:02x}"
        raise _unreadable(message, name, "a spec is YAML or JSON; is this the model's file?") from wrong


def _from_text(text: str, file: str) -> Document:
    if len(text) > LARGEST or len(text.encode("utf-8", "replace")) > LARGEST:
        raise _unreadable(f"the spec is larger than {LARGEST} bytes", file)
    text = text.removeprefix("\ufeff")
    document = Document(file=file, lines=_LINE_BREAK.split(text))
    composer = Composer()
    try:
        _refuse_unprintable(text)
        data, mark = composer.compose(text)
    except Unreadable as wrong:
        earlier = [document.at(mark).diagnose(message) for message, mark in composer.problems[:MOST_REPORTED]]
        raise SpecError([*earlier, document.at(wrong.mark).diagnose(wrong.message, wrong.hint)]) from None
    problems = [document.at(mark).diagnose(message) for message, mark in composer.problems]
    return replace(document, data=data, mark=mark, problems=problems)


def _from_mapping(source: Mapping[Any, Any]) -> Document:
    """Copy what Python gave into plain dicts and tuples, within the bounds that text has."""
    problems: list[Diagnostic] = []
    spent = 0

    def copy(value: Any, path: tuple[Key, ...]) -> Any:
        nonlocal spent
        spent += 1
        if len(path) > DEEPEST or spent > MOST_NODES:
            bound = f"nested more than {DEEPEST} deep" if len(path) > DEEPEST else f"more than {MOST_NODES} values"
            raise SpecError([Location(path=dotted(path[:3])).diagnose(bound)])
        if isinstance(value, Mapping):
            wrong = [f"a key must be text, found {key!r:.60}" for key in value if not isinstance(key, str)]
            problems.extend(Location(path=dotted(path)).diagnose(message) for message in wrong)
            return {key: copy(child, (*path, key)) for key, child in value.items() if isinstance(key, str)}
        if path[:1] == ("rules",) and path[2:] == ("chain",):
            value = unfolded(value)
        if isinstance(value, list | tuple):
            return tuple(copy(child, (*path, index)) for index, child in enumerate(value))
        if isinstance(value, float) and math.isnan(value):
            problems.append(Location(path=dotted(path)).diagnose("nan is not a number"))
        return value

    return Document(copy(source, ()), problems=problems)


def _refuse_unprintable(text: str) -> None:
    found = _UNPRINTABLE.search(text)
    if found is not None:
        before = _LINE_BREAK.split(text[: found.start()])
        message = f"the character U+{ord(found[0]):04X} is not allowed in YAML text"
        raise Unreadable(message, (len(before) - 1, len(before[-1])))


def _unreadable(message: str, file: str, hint: str = "") -> SpecError:
    return SpecError([Diagnostic(message, file, hint=hint)])
