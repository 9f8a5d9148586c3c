"""What one part of a spec says about another: unique names, overrides, keys that exclude each other.

The checks read plain values that need not be correct, so that their problems come with those of every other check.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

from rewriter.language._problems import Problem

_NOT_WITH_JOINT = ("per", "reshape", "from")


def check_references(data: Any) -> Iterator[Problem]:
    """Yield what is wrong between the parts of a spec, whether or not each part is right by itself."""
    if not isinstance(data, dict):
        return
    if "rules" not in data and data.get("absorb") is not True:
        yield Problem((), "missing key 'rules'")
    rules = [(index, rule) for index, rule in enumerate(_list(data.get("rules"))) if isinstance(rule, dict)]
    named = [(index, rule) for index, rule in rules if isinstance(rule.get("name"), str)]
    yield from _names(named)
    yield from _overrides(rules, {rule["name"]: _list(rule.get("overrides")) for _, rule in named})
    for index, rule in rules:
        yield from _keys_together(index, rule)
        yield from _labels(index, rule)


def _names(rules: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, rule in rules:
        owner = first.setdefault(unicodedata.normalize("NFC", rule["name"]), index)
        if owner != index:
            message = f"rules[{owner}] has the name {rule['name']!r} already; each rule needs a name of its own"
            yield Problem(("rules", index, "name"), message)


def _overrides(rules: list[tuple[int, dict[str, Any]]], overridden: dict[str, tuple[Any, ...]]) -> Iterator[Problem]:
    choices = list(overridden)
    for index, rule in rules:
        name = rule.get("name")
        for at, other in enumerate(_list(rule.get("overrides"))):
            path = ("rules", index, "overrides", at)
            if not isinstance(other, str):
                continue
            if other == name:
                yield Problem(path, f"the rule {other!r} cannot override itself")
            elif other not in overridden:
                yield Problem(path, f"there is no rule named {other!r}", "", other, choices)
            elif name in overridden[other]:
                yield Problem(path, f"the rules {name!r} and {other!r} override each other")


def _keys_together(index: int, rule: dict[str, Any]) -> Iterator[Problem]:
    if rule.get("chain") in ((), []) and not rule.get("overrides") and "from" not in rule:
        hint = "name the rule that would own these tensors: `overrides: [rule]`, or write the chain"
        yield Problem(("rules", index, "chain"), "an empty chain does nothing", hint)
    for key in _NOT_WITH_JOINT:
        if rule.get("joint") and key in rule:
            message = f"`{key}` is about one tensor, and `joint` makes the chain compute several"
            yield Problem(("rules", index, key), message, on_key=True)
    per = rule.get("per")
    if "from" in rule and isinstance(per, dict) and "only" in per:
        yield Problem(("rules", index, "per", "only"), "a tensor with `from` stores no chunks that could stay plain")


def _labels(index: int, rule: dict[str, Any]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for at, step in enumerate(_list(rule.get("chain"))):
        for name, keys in step.items() if isinstance(step, dict) else ():
            label = keys.get("label") if isinstance(keys, dict) else None
            if isinstance(label, str) and first.setdefault(label, at) != at:
                message = f"chain[{first[label]}] has the label {label!r} already; labels are unique in a chain"
                yield Problem(("rules", index, "chain", at, name, "label"), message)


def _list(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else ()
