"""YAML text becomes a tree of plain values that know where they are written.

The tree is built from PyYAML's events and not by its constructors, because those read YAML 1.1 (``on`` is
true, ``1e-3`` is text, ``1:30`` is ninety), keep the last of two equal keys, build objects from tags, recurse
with the nesting and expand aliases without bound. Here scalars follow the core schema of YAML 1.2, and every
bound holds before the memory is spent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from rewriter.language._location import Key

MOST_NODES = 100_000
DEEPEST = 50
_LARGEST_INTEGER = 2**63 - 1

_QUOTE = "quote a pattern that starts with * or {"

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip

Mark = tuple[int, int]
"""0-based line and column."""


class Unreadable(Exception):
    """What ends the reading of a text: a message, where, and what to do."""

    def __init__(self, message: str, mark: Mark, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.mark, self.hint = message, mark, hint


@dataclass(slots=True)
class Node:
    """A value with its place; `keys` has the places of a mapping's keys.

    `size` counts nodes with every alias written out, `height` is how deep the nesting below goes.
    """

    value: Any
    mark: Mark
    keys: dict[str, Mark] | None = None
    size: int = 1
    height: int = 0

    def child(self, key: Key) -> Node | None:
        """Return what stands at a mapping's key or a sequence's index."""
        if isinstance(self.value, dict):
            found: Node | None = self.value.get(key)
            return found
        inside = isinstance(self.value, list) and isinstance(key, int) and key < len(self.value)
        return self.value[key] if inside else None

    def plain(self) -> Any:
        """Return dicts, lists and scalars without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


class Composer:
    """Builds the tree of one document; `problems` are those that reading goes on after."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, Mark]] = []
        self._anchors: dict[str, Node | None] = {}
        self._spent = 0

    def compose(self, text: str) -> Node:
        """Return the text's one document.

        Raises:
            Unreadable: it is no YAML, holds no or several documents, or goes beyond a bound.
        """
        events = self._events(text)
        root: Node | None = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise Unreadable("a second document; a spec is one document", _mark(event))
                if event.version not in (None, (1, 2)):
                    raise Unreadable("specs are YAML 1.2; remove the %YAML directive", _mark(event))
                root = self._node(next(events), events, 0)
        if root is None or root.value is None:
            raise Unreadable("the spec is empty; it starts with `reparam: 1`", root.mark if root else (0, 0))
        return root

    def _events(self, text: str) -> Iterator[Any]:
        try:
            yield from yaml.parse(text, Loader=_LOADER)
        except yaml.MarkedYAMLError as wrong:
            mark = wrong.problem_mark or wrong.context_mark
            message = ", ".join(part for part in (wrong.context, wrong.problem) if part)
            if "quoted scalar" in (wrong.context or "") and wrong.context_mark:
                mark, message = wrong.context_mark, "this quote is not closed"
            elif mark and text[mark.index : mark.index + 1] == "\t":
                message = "a tab; YAML is indented with spaces"
            hint = _QUOTE if "alias" in (wrong.context or "") or (mark and _after_brace(text, mark.index)) else ""
            raise Unreadable(f"not YAML: {message}", (mark.line, mark.column) if mark else (0, 0), hint) from wrong
        except yaml.YAMLError as wrong:
            raise Unreadable(f"not YAML: {wrong}", (0, 0)) from wrong

    def _node(self, event: Any, events: Iterator[Any], depth: int) -> Node:
        mark = _mark(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event.anchor, mark, depth)
        self._spend(1, mark)
        if depth > DEEPEST:
            raise Unreadable(f"nested more than {DEEPEST} deep", mark)
        if event.tag is not None:
            self.problems.append((f"tags are not read, found {event.tag!r}; write the plain value", mark))
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = Node(self._scalar(event, mark), mark)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(mark, events, depth)
        else:
            node = self._mapping(mark, events, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, anchor: str | None, mark: Mark, depth: int) -> Node:
        if anchor is None or anchor not in self._anchors:
            raise Unreadable(f"the alias *{anchor} has no anchor &{anchor} above it", mark, _QUOTE)
        node = self._anchors[anchor]
        if node is None:
            raise Unreadable(f"the alias *{anchor} stands inside its own anchor", mark)
        self._spend(node.size, mark)
        if depth + node.height > DEEPEST:
            raise Unreadable(f"nested more than {DEEPEST} deep", mark)
        return replace(node, mark=mark)

    def _sequence(self, mark: Mark, events: Iterator[Any], depth: int) -> Node:
        node = Node([], mark)
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            child = self._node(event, events, depth + 1)
            node.value.append(child)
            _grow(node, child)
        return node

    def _mapping(self, mark: Mark, events: Iterator[Any], depth: int) -> Node:
        node = Node({}, mark, {})
        merged: list[Node] = []
        assert node.keys is not None
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key, place = self._node(event, events, depth + 1), _mark(event)
            child = self._node(next(events), events, depth + 1)
            if not isinstance(key.value, str):
                self.problems.append((f"a key must be text, found {_written(key, event)}", place))
                continue
            if key.value in node.keys:
                line, column = node.keys[key.value]
                first = f"it stands at line {line + 1}, column {column + 1} already"
                self.problems.append((f"repeated key {_short(key.value)!r}; {first}", place))
                continue
            node.keys[key.value] = place
            if key.value == "<<" and _plain(event):
                merged = self._merged(child)
            else:
                node.value[key.value] = child
                _grow(node, child)
        for other in merged:
            self._spend(other.size, mark)
            for name, child in other.value.items():
                if name not in node.value:
                    node.value[name], node.keys[name] = child, (other.keys or {})[name]
                    _grow(node, child)
        return node

    def _merged(self, child: Node) -> list[Node]:
        found = child.value if isinstance(child.value, list) else [child]
        if not all(isinstance(other.value, dict) for other in found):
            self.problems.append(("`<<` merges mappings, and this is none", child.mark))
            return []
        return found

    def _scalar(self, event: Any, mark: Mark) -> Any:
        text: str = event.value
        if not _plain(event):
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _LEADING_ZERO.fullmatch(text):
            digits = text.lstrip("+-0") or "0"
            self.problems.append((f"{_short(text)} is octal to some readers; write {_short(digits)} or quote it", mark))
            return 0
        if _INTEGER.fullmatch(text):
            number = int(text, 0) if len(text) <= 25 else _LARGEST_INTEGER + 1
            if abs(number) > _LARGEST_INTEGER:
                self.problems.append((f"the number {_short(text)} is larger than 64 bits hold", mark))
            return number
        if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
            value = float(text) if _FLOAT.fullmatch(text) else float("inf")
            if value in (float("inf"), float("-inf")):
                self.problems.append((f"{_short(text)} is not a finite number", mark))
            return value
        return text

    def _spend(self, nodes: int, mark: Mark) -> None:
        self._spent += nodes
        if self._spent > MOST_NODES:
            raise Unreadable(f"more than {MOST_NODES} values, with every alias written out", mark)


def _after_brace(text: str, index: int) -> bool:
    return text[:index].endswith("}") and text[index : index + 1] not in ("", "\n")


def _plain(event: Any) -> bool:
    return isinstance(event, yaml.ScalarEvent) and bool(event.implicit[0])


def _grow(node: Node, child: Node) -> None:
    node.size += child.size
    node.height = max(node.height, child.height + 1)


def _mark(event: Any) -> Mark:
    return event.start_mark.line, event.start_mark.column


def _written(key: Node, event: Any) -> str:
    if isinstance(event, yaml.ScalarEvent):
        return f"{_short(event.value)} (quote it)" if event.value else "nothing"
    return "a list" if isinstance(key.value, list) else "a mapping"


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
