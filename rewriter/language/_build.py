"""A spec that has been checked becomes an immutable value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rewriter.language._arguments import Resolved
from rewriter.language._chains import written_steps
from rewriter.language._frozen import FrozenMapping
from rewriter.language._location import Key, Location
from rewriter.language._model import Expect, Per, Rule, Spec, Step
from rewriter.language._schema import RuleForm, SpecForm, read_expect
from rewriter.language._selectors import Selector, select
from rewriter.language._source import Document


def build(form: SpecForm, document: Document, steps: Mapping[tuple[int, int], Resolved]) -> Spec:
    """Return the Spec; `steps` has what the named steps mean, by rule and place in the chain."""
    rules = tuple(_rule(rule, index, document, steps) for index, rule in enumerate(form.rules or ()))
    return Spec(rules, FrozenMapping(form.imports), document.file, form.absorb)


def _rule(form: RuleForm, index: int, document: Document, steps: Mapping[tuple[int, int], Resolved]) -> Rule:
    base: tuple[Key, ...] = ("rules", index)
    written: dict[str, Any] = document.data["rules"][index]
    by_owner = bool(form.joint)
    exclude = _selector("except", written, base, document, by_owner) if "except" in written else None
    return Rule(
        name=form.name,
        select=_selector("select", written, base, document, by_owner),
        chain=tuple(_chain(written, index, document, steps)),
        exclude=exclude,
        expect=Expect(*read_expect(form.expect)),
        overrides=tuple(form.overrides or ()),
        cache=form.cache,
        init=form.init,
        share=form.share,
        unsafe=form.unsafe,
        per=Per(form.per.dim, form.per.chunks) if form.per else None,
        reshape=tuple(form.reshape) if form.reshape else None,
        source=form.source,
        joint=tuple(form.joint or ()),
        batch=form.batch,
        memory=form.memory,
        location=document.locate(base),
        places=dict(_places(written, base, document)),
    )


def _selector(key: str, written: dict[str, Any], base: tuple[Key, ...], document: Document, by_owner: bool) -> Selector:
    def locate(*path: Key) -> Location:
        return document.locate((*base, key, *path))

    return select(written[key], by_owner=by_owner, locate=locate)


def _chain(
    written: dict[str, Any], index: int, document: Document, steps: Mapping[tuple[int, int], Resolved]
) -> Iterator[Step]:
    named = {step.index: step for step in written_steps(written, index)}
    for at, value in enumerate(written["chain"]):
        location = document.locate(("rules", index, "chain", at))
        if at in named:
            step, resolved = named[at], steps[index, at]
            yield Step(
                name=step.name,
                arguments=FrozenMapping(resolved.arguments),
                label=step.reserved.get("label"),
                inputs=tuple(step.reserved.get("inputs", ())),
                factory=resolved.factory,
                location=location,
            )
        else:
            yield Step(name=type(value).__name__, module=value, location=location)


def _places(
    written: Any, base: tuple[Key, ...], document: Document, path: tuple[Key, ...] = ()
) -> Iterator[tuple[tuple[Key, ...], Location]]:
    """Yield where the rule's keys are written, and one level below them."""
    keyed = dict(enumerate(written)) if isinstance(written, list) else written
    for key, value in keyed.items() if isinstance(keyed, dict) else ():
        yield (*path, key), document.locate((*base, *path, key))
        if not path:
            yield from _places(value, base, document, (key,))
