"""YAML text becomes mappings, lists and scalars that know where they are written.

The tree is built from PyYAML's events and not by its constructors. Those read YAML 1.1, keep the last of two equal
keys, build objects from tags, recurse with the nesting and expand aliases without bound. Here every bound is checked
before the memory is spent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from rewriter.language._document import Mark, MarkedDict, MarkedTuple
from rewriter.language._scalars import read_scalar, shortened

MOST_NODES = 100_000
DEEPEST = 50
_QUOTE = "quote a pattern that starts with * or {"
_OPEN = object()
"""The value of an anchor that is still being read."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Unreadable(Exception):
    """What ends the reading of a text: a message, where, and what to do."""

    def __init__(self, message: str, mark: Mark, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.mark, self.hint = message, mark, hint


class Composer:
    """Builds the tree of one document; `problems` do not stop the reading."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, Mark]] = []
        self._anchors: dict[str, Any] = {}
        self._spent = 0

    def compose(self, text: str) -> tuple[Any, Mark]:
        """Return the text's one document and where it starts.

        Raises:
            Unreadable: the text is not YAML, has no or several documents, or exceeds a bound.
        """
        events = _events(text)
        root: tuple[Any, Mark] | None = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise Unreadable("a second document; a spec is one document", _mark(event))
                if event.version not in (None, (1, 2)):
                    raise Unreadable("specs are YAML 1.2; remove the %YAML directive", _mark(event))
                first = next(events)
                root = self._value(first, events, 0), _mark(first)
        if root is None or root[0] is None:
            raise Unreadable("the spec is empty; it starts with `reparam: 1`", root[1] if root else (0, 0))
        return root

    def _value(self, event: Any, events: Iterator[Any], depth: int) -> Any:
        mark = _mark(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event.anchor, mark, depth)
        self._spend(1, depth, mark)
        if event.tag is not None:
            self.problems.append((f"tags are not read, found {event.tag!r}; write the plain value", mark))
        if event.anchor is not None:
            self._anchors[event.anchor] = _OPEN
        value: Any
        if isinstance(event, yaml.SequenceStartEvent):
            value = self._list(events, depth)
        elif isinstance(event, yaml.MappingStartEvent):
            value = self._mapping(events, depth)
        else:
            value, problem = read_scalar(event.value) if _is_plain(event) else (event.value, "")
            if problem:
                self.problems.append((problem, mark))
        if event.anchor is not None:
            self._anchors[event.anchor] = value
        return value

    def _alias(self, anchor: Any, mark: Mark, depth: int) -> Any:
        if anchor not in self._anchors:
            raise Unreadable(f"the alias *{anchor} has no anchor &{anchor} above it", mark, _QUOTE)
        value = self._anchors[anchor]
        if value is _OPEN:
            raise Unreadable(f"the alias *{anchor} is inside its own anchor", mark)
        size, height = _extent(value)
        self._spend(size, depth + height, mark)
        return value

    def _list(self, events: Iterator[Any], depth: int) -> MarkedTuple:
        entries = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            entries.append((_mark(event), self._value(event, events, depth + 1)))
        found = MarkedTuple(value for _, value in entries)
        found.values_at = [mark for mark, _ in entries]
        return found

    def _mapping(self, events: Iterator[Any], depth: int) -> MarkedDict:
        found = MarkedDict()
        merged: Sequence[MarkedDict] = ()
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self._value(event, events, depth + 1)
            after = next(events)
            value = self._value(after, events, depth + 1)
            if not isinstance(key, str):
                self.problems.append((f"a key must be text, found {_written(key, event)}", _mark(event)))
            elif key in found.keys_at:
                line, column = found.keys_at[key]
                first = f"line {line + 1}, column {column + 1} has it already"
                self.problems.append((f"repeated key {shortened(key)!r}; {first}", _mark(event)))
            else:
                found.keys_at[key] = _mark(event)
                if key == "<<" and _is_plain(event):
                    merged = self._merged(value, _mark(after))
                else:
                    found[key], found.values_at[key] = value, _mark(after)
        for other in merged:
            for key, value in other.items():
                if key not in found:
                    found[key] = value
                    found.keys_at[key], found.values_at[key] = other.keys_at[key], other.values_at[key]
        return found

    def _merged(self, value: Any, mark: Mark) -> Sequence[MarkedDict]:
        found = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(other, MarkedDict) for other in found):
            self.problems.append(("`<<` merges mappings, and this is none", mark))
            return ()
        return found

    def _spend(self, values: int, depth: int, mark: Mark) -> None:
        self._spent += values
        if self._spent > MOST_NODES:
            raise Unreadable(f"more than {MOST_NODES} values, with every alias written out", mark)
        if depth > DEEPEST:
            raise Unreadable(f"nested more than {DEEPEST} deep", mark)


def _events(text: str) -> Iterator[Any]:
    try:
        yield from yaml.parse(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as wrong:
        mark = wrong.problem_mark or wrong.context_mark
        context = wrong.context or ""
        message = ", ".join(part for part in (context, wrong.problem) if part)
        hint = ""
        if "quoted scalar" in context and wrong.context_mark:
            mark, message = wrong.context_mark, "this quote is not closed"
        elif mark and text[mark.index : mark.index + 1] == "\t":
            message = "a tab; YAML is indented with spaces"
        elif "alias" in context or (mark and text[: mark.index].endswith("}") and text[mark.index :].strip("\n")):
            hint = _QUOTE
        raise Unreadable(f"not YAML: {message}", (mark.line, mark.column) if mark else (0, 0), hint) from wrong
    except yaml.YAMLError as wrong:
        raise Unreadable(f"not YAML: {wrong}", (0, 0)) from wrong


def _extent(value: Any) -> tuple[int, int]:
    """Return how many values `value` is made of, with every alias written out, and how deep they nest."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    extents = [_extent(child) for child in children]
    return 1 + sum(size for size, _ in extents), 1 + max((height for _, height in extents), default=-1)


def _is_plain(event: Any) -> bool:
    return isinstance(event, yaml.ScalarEvent) and bool(event.implicit[0])


def _mark(event: Any) -> Mark:
    return event.start_mark.line, event.start_mark.column


def _written(key: Any, event: Any) -> str:
    if isinstance(event, yaml.ScalarEvent):
        return f"{shortened(event.value)} (quote it)" if event.value else "nothing"
    return "a list" if isinstance(key, tuple) else "a mapping"
