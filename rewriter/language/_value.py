"""What the values of a spec have in common: they are immutable, and rules and steps know where they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A model that is checked strictly, cannot be changed, and equals a model of the same fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def __eq__(self, other: object) -> bool:
        # Pydantic would compare private attributes too, and two equal rules may be written in two places.
        return type(self) is type(other) and self.__dict__ == other.__dict__


class FrozenMapping(Mapping[str, Any]):
    """A mapping that nobody can change; it equals any mapping of the same items."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        self._items: dict[str, Any] = dict(items or {})

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items))

    def __repr__(self) -> str:
        return repr(self._items)


def plain(value: Any) -> Any:
    """Return `value` with dicts and lists for mappings and tuples."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
