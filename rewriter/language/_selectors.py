"""Selectors: which tensors of a model a rule is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewriter.language._frozen import FrozenMapping
from rewriter.language._glob import Glob
from rewriter.language._location import Key, Location
from rewriter.language._predicates import PREDICATES, Path, Predicate
from rewriter.language._tensors import TensorInfo, class_names

__all__ = ["Selector", "TensorInfo", "class_names", "select"]


@dataclass(frozen=True, slots=True)
class Selector:
    """Says of each tensor whether it is meant: all predicates of any alternative hold.

    >>> wanted = select(["blocks.*.q.weight", {"tensor": "bias", "ndim": 1}])
    >>> wanted.matches(TensorInfo("blocks.3.q.weight"))
    True
    >>> [str(one) for one in wanted.alternatives]
    ['blocks.*.q.weight', '{tensor: bias, ndim: 1}']

    Arguments:
        written: as in the spec: a glob, a mapping, or a tuple of both.
        predicates: what must hold together; empty for a list.
        listed: one selector for each entry of a list.
    """

    written: Any
    predicates: tuple[Predicate, ...] = field(default=(), compare=False, repr=False)
    listed: tuple[Selector, ...] = field(default=(), compare=False, repr=False)
    by_owner: bool = field(default=False, repr=False)
    location: Location = field(default=Location(), compare=False, repr=False)

    @property
    def alternatives(self) -> tuple[Selector, ...]:
        """The selectors that a list ORs, each with its own `location`; without a list, this one alone."""
        return self.listed or (self,)

    def matches(self, info: TensorInfo) -> bool:
        """Return whether any alternative matches the tensor."""
        if self.listed:
            return any(alternative.matches(info) for alternative in self.listed)
        return all(predicate.holds(info) for predicate in self.predicates)

    def __str__(self) -> str:
        return _show(self.written)


def select(
    written: str | Mapping[str, Any] | Sequence[Any],
    *,
    by_owner: bool = False,
    locate: Callable[..., Location] = lambda *path: Location(),
) -> Selector:
    """Compile a selector that has been checked.

    A string and ``path`` are about the tensor's full name. Beside a ``tensor`` key, and with `by_owner`, they
    may name the tensor's owner instead: ``{path: "blocks.*.fc", tensor: weight}``.

    Arguments:
        by_owner: the rule is ``joint``.
        locate: where the selector is written, and where the entry with a given index is.
    """
    if isinstance(written, str):
        return Selector(written, (Path(Glob(written), by_owner),), (), by_owner, locate())
    if isinstance(written, Mapping):
        owner_too = by_owner or "tensor" in written
        predicates = tuple(
            Path(Glob(value), owner_too) if key == "path" else PREDICATES[key](value) for key, value in written.items()
        )
        return Selector(_frozen(written), predicates, (), by_owner, locate())
    entries = tuple(select(entry, by_owner=by_owner, locate=_at(locate, index)) for index, entry in enumerate(written))
    return Selector(tuple(entry.written for entry in entries), (), entries, by_owner, locate())


def _at(locate: Callable[..., Location], index: Key) -> Callable[..., Location]:
    return lambda *path: locate(index, *path)


def _frozen(written: Mapping[str, Any]) -> FrozenMapping:
    return FrozenMapping({key: tuple(value) if isinstance(value, list) else value for key, value in written.items()})


def _show(written: Any) -> str:
    if isinstance(written, Mapping):
        return "{" + ", ".join(f"{key}: {_show(value)}" for key, value in written.items()) + "}"
    if isinstance(written, tuple):
        return "[" + ", ".join(_show(value) for value in written) + "]"
    return str(written).lower() if isinstance(written, bool) else str(written)
