"""The steps of a spec's chains, found in plain values that need not be correct yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rewriter.language._location import Key
from rewriter.language._schema import RESERVED


@dataclass(frozen=True, slots=True)
class WrittenStep:
    """A step that names a parametrization: what goes to its constructor, and what the compiler keeps."""

    rule: int
    index: int
    name: str
    arguments: dict[str, Any]
    reserved: dict[str, Any]

    @property
    def path(self) -> tuple[Key, ...]:
        return ("rules", self.rule, "chain", self.index)


def written_rules(data: Any) -> list[tuple[int, dict[str, Any]]]:
    """Return the rules that are mappings, with their index."""
    rules = data.get("rules") if isinstance(data, dict) else None
    if not isinstance(rules, list):
        return []
    return [(index, rule) for index, rule in enumerate(rules) if isinstance(rule, dict)]


def written_steps(rule: dict[str, Any], at: int) -> Iterator[WrittenStep]:
    """Yield the well-formed steps of a rule that are no instances."""
    chain = rule.get("chain")
    for index, step in enumerate(chain if isinstance(chain, list) else ()):
        if isinstance(step, str):
            yield WrittenStep(at, index, step, {}, {})
        elif isinstance(step, dict) and len(step) == 1:
            [(name, keys)] = step.items()
            if keys is None or isinstance(keys, dict):
                keys = keys or {}
                yield WrittenStep(
                    at,
                    index,
                    name,
                    {key: value for key, value in keys.items() if key not in RESERVED},
                    {key: value for key, value in keys.items() if key in RESERVED},
                )
