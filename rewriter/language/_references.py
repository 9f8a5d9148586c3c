"""What one part of a spec says about another: unique names, overrides, keys that exclude each other."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

from rewriter.language._chains import written_rules, written_steps
from rewriter.language._grammar import check
from rewriter.language._problems import Problem
from rewriter.language._schema import StepKeys

_NOT_WITH_JOINT = ("per", "reshape", "from")


def check_references(data: Any) -> Iterator[Problem]:
    """Yield what is wrong between the parts of a spec, whether or not each part is right by itself."""
    if isinstance(data, dict) and "rules" not in data and data.get("absorb") is not True:
        yield Problem((), "missing key 'rules'")
    rules = written_rules(data)
    yield from _names(rules)
    yield from _overrides(rules)
    for index, rule in rules:
        yield from _keys_together(index, rule)
        yield from _steps(index, rule)


def _names(rules: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, rule in rules:
        if _named(rule):
            owner = first.setdefault(unicodedata.normalize("NFC", rule["name"]), index)
            if owner != index:
                message = f"the name {rule['name']!r} is taken by rules[{owner}]; each rule has a name of its own"
                yield Problem(("rules", index, "name"), message)


def _overrides(rules: list[tuple[int, dict[str, Any]]]) -> Iterator[Problem]:
    overridden = {rule["name"]: set(_texts(rule.get("overrides"))) for _, rule in rules if _named(rule)}
    choices = list(overridden)
    for index, rule in rules:
        for at, other in enumerate(_texts(rule.get("overrides"))):
            path = ("rules", index, "overrides", at)
            if other == rule.get("name"):
                yield Problem(path, f"the rule {other!r} cannot override itself")
            elif other not in overridden:
                yield Problem(path, f"there is no rule named {other!r}", "", other, choices)
            elif _named(rule) and rule["name"] in overridden[other]:
                yield Problem(path, f"the rules {rule['name']!r} and {other!r} override each other")


def _keys_together(index: int, rule: dict[str, Any]) -> Iterator[Problem]:
    if rule.get("chain") == [] and not rule.get("overrides") and "from" not in rule:
        hint = "name the rule that would own these tensors: `overrides: [rule]`, or write the chain"
        yield Problem(("rules", index, "chain"), "an empty chain does nothing", hint)
    for key in _NOT_WITH_JOINT:
        if rule.get("joint") and key in rule:
            message = f"`{key}` is about one tensor, and `joint` makes the chain compute several"
            yield Problem(("rules", index, key), message, on_key=True)


def _steps(index: int, rule: dict[str, Any]) -> Iterator[Problem]:
    labels: dict[str, int] = {}
    for step in written_steps(rule, index):
        path = (*step.path, step.name)
        yield from check(StepKeys, step.reserved, path)[1]
        label = step.reserved.get("label")
        if isinstance(label, str) and labels.setdefault(label, step.index) != step.index:
            message = f"the label {label!r} is taken by chain[{labels[label]}]; labels are unique in a chain"
            yield Problem((*path, "label"), message)


def _named(rule: dict[str, Any]) -> bool:
    return isinstance(rule.get("name"), str)


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
