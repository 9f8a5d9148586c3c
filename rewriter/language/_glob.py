"""Dotted globs, matched in time proportional to the name: ``blocks.*.attn.{q,k,v}.weight``.

Backtracking regular expressions take exponential time on some globs (``**a**a**a**b``), so a glob becomes a
nondeterministic automaton that is walked without backtracking; sets of states seen before are remembered.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LONGEST = 1000
DEEPEST = 16
_REMEMBERED = 4096


class GlobError(ValueError):
    """A glob that cannot be read."""


class Glob:
    """A dotted glob; `matches` is always about the full name.

    >>> Glob("blocks.*.{q,k}.weight").matches("blocks.11.q.weight")
    True
    >>> Glob("rnn.**.weight_hh*").matches("rnn.weight_hh_l0")
    True

    ``*`` stays inside one segment and may be empty, ``**`` spans segments, ``{a,b}`` alternates and nests.
    At the start of a segment ``**.`` also stands for no segment at all. Everything else is literal, ``[0-9]``
    and ``?`` too; spaces around an alternative do not count.

    Raises:
        GlobError: braces that do not match, an empty segment, or a pattern that is empty or too long.
    """

    __slots__ = ("_automaton", "_prefix", "pattern")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self._automaton = _compile(pattern)
        self._prefix = pattern[: min(pattern.find(sign) % (len(pattern) + 1) for sign in "*{")]

    def matches(self, name: str) -> bool:
        return name.startswith(self._prefix) and self._automaton.accepts(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Glob) and self.pattern == other.pattern

    def __hash__(self) -> int:
        return hash(self.pattern)

    def __repr__(self) -> str:
        return f"Glob({self.pattern!r})"

    def __reduce__(self) -> tuple[type[Glob], tuple[str]]:
        return (Glob, (self.pattern,))


@dataclass(slots=True, eq=False)
class _StateSet:
    members: frozenset[int]
    accepting: bool
    following: dict[str, _StateSet] = field(default_factory=dict)


class _Automaton:
    """States are numbers and 0 accepts; each consumes a character (or loops on many) or only forks."""

    def __init__(self) -> None:
        self.consumes: dict[int, tuple[str, int]] = {}
        self.loops: dict[int, bool] = {}
        self.forks: dict[int, tuple[int, ...]] = {0: ()}
        self._known: dict[frozenset[int], _StateSet] = {}
        self._start: _StateSet | None = None

    def literal(self, character: str, then: int) -> int:
        state = self._fresh(())
        self.consumes[state] = (character, then)
        return state

    def anything(self, then: int, *, dots: bool) -> int:
        state = self._fresh((then,))
        self.loops[state] = dots
        return state

    def fork(self, branches: tuple[int, ...]) -> int:
        return self._fresh(branches)

    def begin(self, state: int) -> None:
        self._start = self._closed({state})

    def accepts(self, name: str) -> bool:
        current = self._start
        assert current is not None
        for character in name:
            following = current.following.get(character)
            if following is None:
                following = self._step(current, character)
            if not following.members:
                return False
            current = following
        return current.accepting

    def _fresh(self, forks: tuple[int, ...]) -> int:
        state = len(self.forks)
        self.forks[state] = forks
        return state

    def _step(self, current: _StateSet, character: str) -> _StateSet:
        reached = set()
        for state in current.members:
            if state in self.consumes and self.consumes[state][0] == character:
                reached.add(self.consumes[state][1])
            if state in self.loops and (self.loops[state] or character != "."):
                reached.add(state)
        following = self._closed(reached)
        if len(self._known) < _REMEMBERED:
            current.following[character] = following
        return following

    def _closed(self, states: set[int]) -> _StateSet:
        members, pending = set(states), list(states)
        while pending:
            for state in self.forks[pending.pop()]:
                if state not in members:
                    members.add(state)
                    pending.append(state)
        key = frozenset(members)
        known = self._known.get(key)
        if known is None:
            known = _StateSet(key, 0 in key)
            if len(self._known) < _REMEMBERED:
                self._known[key] = known
        return known


@dataclass(frozen=True, slots=True)
class _Any:
    dots: bool


@dataclass(frozen=True, slots=True)
class _Either:
    branches: tuple[tuple[_Part, ...], ...]


_Part = str | _Any | _Either


def _compile(pattern: str) -> _Automaton:
    if not pattern:
        raise GlobError("an empty pattern matches nothing")
    if len(pattern) > LONGEST:
        raise GlobError(f"a pattern of {len(pattern)} characters; at most {LONGEST} are read")
    if pattern.startswith(".") or pattern.endswith(".") or ".." in pattern:
        raise GlobError("an empty segment: a dot at the start, at the end or after another dot")
    parts, end = _sequence(pattern, 0, 0, segment_starts=True)
    if end < len(pattern):
        raise GlobError(f"'}}' without '{{' at character {end + 1}")
    automaton = _Automaton()
    automaton.begin(_link(automaton, parts, 0))
    return automaton


def _sequence(text: str, at: int, depth: int, *, segment_starts: bool) -> tuple[tuple[_Part, ...], int]:
    """Read parts until the end, a closing brace, or (inside braces) a comma."""
    parts: list[_Part] = []
    while at < len(text) and text[at] != "}" and not (depth and text[at] == ","):
        if text[at] == "{":
            part, at = _braces(text, at, depth + 1, segment_starts=segment_starts)
            parts.append(part)
            segment_starts = False
        elif text.startswith("**.", at) and segment_starts:
            parts.append(_Either(((_Any(dots=True), "."), ())))
            at += 3
        elif text.startswith("**", at):
            parts.append(_Any(dots=True))
            at += 2
            segment_starts = False
        elif text[at] == "*":
            parts.append(_Any(dots=False))
            at += 1
            segment_starts = False
        else:
            parts.append(text[at])
            segment_starts = text[at] == "."
            at += 1
    return tuple(parts), at


def _braces(text: str, opened: int, depth: int, *, segment_starts: bool) -> tuple[_Part, int]:
    if depth > DEEPEST:
        raise GlobError(f"braces nested more than {DEEPEST} deep")
    branches: list[tuple[_Part, ...]] = []
    at = opened
    while at == opened or text[at] == ",":
        at += 1
        while text.startswith(" ", at):
            at += 1
        parts, at = _sequence(text, at, depth, segment_starts=segment_starts)
        if at == len(text):
            raise GlobError(f"'{{' at character {opened + 1} is never closed")
        branches.append(_stripped(parts))
    return _Either(tuple(branches)), at + 1


def _stripped(parts: tuple[_Part, ...]) -> tuple[_Part, ...]:
    while parts and parts[-1] == " ":
        parts = parts[:-1]
    return parts


def _link(automaton: _Automaton, parts: tuple[_Part, ...], then: int) -> int:
    for part in reversed(parts):
        if isinstance(part, str):
            then = automaton.literal(part, then)
        elif isinstance(part, _Any):
            then = automaton.anything(then, dots=part.dots)
        else:
            then = automaton.fork(tuple(_link(automaton, branch, then) for branch in part.branches))
    return then
