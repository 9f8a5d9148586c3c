"""A Spec as plain values again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewriter.language._model import Rule, Spec, Step


def write(spec: Spec) -> dict[str, Any]:
    """Return the mapping that loads to an equal spec; keys at their defaults are left out."""
    plain: dict[str, Any] = {"reparam": 1}
    if spec.imports:
        plain["imports"] = dict(spec.imports)
    if spec.absorb:
        plain["absorb"] = True
    plain["rules"] = [_rule(rule) for rule in spec.rules]
    return plain


def _rule(rule: Rule) -> dict[str, Any]:
    from rewriter.language._model import Expect

    keys: list[tuple[str, Any, Any]] = [
        ("except", rule.exclude and _plain(rule.exclude.written), None),
        ("expect", str(rule.expect), str(Expect())),
        ("overrides", _plain(rule.overrides), []),
        ("cache", rule.cache, "forward"),
        ("init", rule.init, "keep"),
        ("share", rule.share, False),
        ("unsafe", rule.unsafe, False),
        ("per", rule.per and {"dim": rule.per.dim, "chunks": rule.per.chunks}, None),
        ("reshape", _plain(rule.reshape), None),
        ("from", rule.source, None),
        ("joint", _plain(rule.joint), []),
        ("batch", rule.batch, "auto"),
        ("memory", rule.memory, "keep"),
    ]
    plain = {"name": rule.name, "select": _plain(rule.select.written)}
    plain |= {key: value for key, value, default in keys if value != default}
    plain["chain"] = [_step(step) for step in rule.chain]
    if plain.get("expect", "").isdigit():
        plain["expect"] = int(plain["expect"])
    return plain


def _step(step: Step) -> Any:
    if step.module is not None:
        return step.module
    keys = {key: _plain(value) for key, value in step.arguments.items()}
    if step.label is not None:
        keys["label"] = step.label
    if step.inputs:
        keys["inputs"] = list(step.inputs)
    return {step.name: keys} if keys else step.name


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
