"""Which rule owns which tensors: every selector is resolved here, once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn.parameter import is_lazy

from rewriter.errors import Diagnostic, listing
from rewriter.language import Rule, Selector, Spec
from rewriter.language._glob import Glob
from rewriter.planning._survey import Entry

_MODULE = re.compile(r"\bmodule: '?([\w.]+)")


@dataclass
class Claim:
    """A rule and the tensor that it selects; the tensors of one module for a `joint` rule."""

    rule: Rule
    entries: list[Entry]

    @property
    def name(self) -> str:
        """The site's name: its first tensor's."""
        return self.entries[0].name


def resolve(spec: Spec, entries: Sequence[Entry]) -> tuple[list[Claim], list[Diagnostic]]:
    """Return the claims of all rules in the model's order, and every way in which the spec does not fit."""
    problems: list[Diagnostic] = []
    claims: list[Claim] = []
    for rule in spec.rules:
        matched = _matched(rule, entries, problems)
        if rule.joint:
            claims.extend(_joint_claims(rule, matched, entries, problems))
        else:
            claims.extend(Claim(rule, [entry]) for entry in matched)
    claims = _settle_overlaps(claims, problems)
    for rule in spec.rules:
        count = sum(claim.rule is rule for claim in claims)
        if count not in rule.expect and not _explained(rule, problems):
            problems.append(
                rule.where("expect").diagnose(
                    f"rule {rule.name!r} owns {count} sites; it expects {rule.expect}",
                    _overridden(rule, spec),
                )
            )
    order = {id(entry): index for index, entry in enumerate(entries)}
    owning = [claim for claim in claims if claim.rule.chain or claim.rule.source]
    return sorted(owning, key=lambda claim: order[id(claim.entries[0])]), problems


def _matched(rule: Rule, entries: Sequence[Entry], problems: list[Diagnostic]) -> list[Entry]:
    selected = _select(rule, "select", rule.select, entries, problems)
    if rule.exclude is None:
        return selected
    excluded = {id(entry) for entry in _select(rule, "except", rule.exclude, entries, problems)}
    return [entry for entry in selected if id(entry) not in excluded]


def _select(
    rule: Rule, key: str, selector: Selector, entries: Sequence[Entry], problems: list[Diagnostic]
) -> list[Entry]:
    found: dict[int, Entry] = {}
    alternatives = selector.alternatives
    for index, alternative in enumerate(alternatives):
        matches = [entry for entry in entries if any(map(alternative.matches, entry.infos))]
        found.update((id(entry), entry) for entry in matches)
        if not matches and not (key == "select" and rule.expect.minimum == 0):
            place = rule.where(key, index) if len(alternatives) > 1 else rule.where(key)
            problems.append(
                place.diagnose(
                    f"rule {rule.name!r}: {key} {alternative} matches no tensor of the model",
                    nearest(str(alternative), entries),
                )
            )
    return [entry for entry in entries if id(entry) in found]


def nearest(pattern: str, entries: Sequence[Entry]) -> str:
    """Return a hint: the names in the model that are similar to a pattern that matches nothing."""
    wanted = _MODULE.search(pattern)
    classes = dict.fromkeys(name for entry in entries for info in entry.infos for name in info.module_classes)
    if wanted is not None and wanted[1] not in classes:
        near = difflib.get_close_matches(wanted[1], list(classes), n=1, cutoff=0.6)
        owners = list(dict.fromkeys(info.module_classes[0] for entry in entries for info in entry.infos))
        shown = ", ".join(owners[:6]) + (", …" if len(owners) > 6 else "")
        return f"did you mean {near[0]}?" if near else f"the modules that own tensors are {shown}"
    names = [name for entry in entries for name in entry.names]
    if not names:
        return "the model has no tensors"
    pattern = pattern.strip("'\"")
    inside = next((name for name in names if pattern and name.startswith(f"{pattern}.")), None)
    if inside is not None:
        below = "*" if inside.count(".") == pattern.count(".") + 1 else "**"
        return f"`{pattern}` is a module: `{inside}`, or `{pattern}.{below}`"
    deeper = ".".join("**" if part == "*" else part for part in pattern.split("."))
    if deeper != pattern and ":" not in deeper and any(map(Glob(deeper).matches, names)):
        return f"`*` stands for one part of a name: did you mean {deeper!r}?"
    near = difflib.get_close_matches(pattern, names[:5000], n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(name) for name in near)}?"
    shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    lazy = next((entry.name for entry in entries if entry.tensor is not None and is_lazy(entry.tensor)), None)
    more = f"; {lazy} has no shape until the model has run once" if lazy is not None else ""
    return f"the model's tensors are {shown}{more}"


def _joint_claims(
    rule: Rule, matched: list[Entry], entries: Sequence[Entry], problems: list[Diagnostic]
) -> list[Claim]:
    by_name = {name: entry for entry in entries for name in entry.names}
    chosen = (info for entry in matched for info in entry.infos if rule.select.matches(info))
    owners = dict.fromkeys(info.owner for info in chosen)
    claims = []
    for owner in owners:
        names = [f"{owner}.{tensor}" if owner else tensor for tensor in rule.joint]
        members = [by_name[name] for name in names if name in by_name]
        if len(members) == len(names):
            claims.append(Claim(rule, members))
        else:
            missing = [name for name in names if name not in by_name]
            problems.append(
                rule.where("joint").diagnose(
                    f"rule {rule.name!r}: {owner or 'the model'} has no {', '.join(missing)}",
                    "leave the module out with `except`, or take the name out of `joint`",
                )
            )
    return claims


def _settle_overlaps(claims: list[Claim], problems: list[Diagnostic]) -> list[Claim]:
    by_entry: dict[int, list[Claim]] = {}
    for claim in claims:
        for entry in claim.entries:
            by_entry.setdefault(id(entry), []).append(claim)
    dropped: set[int] = set()
    contested: dict[tuple[str, ...], list[Claim]] = {}
    for rivals in by_entry.values():
        if len(rivals) == 1:
            continue
        beaten = {name for claim in rivals for name in claim.rule.overrides}
        left = [claim for claim in rivals if claim.rule.name not in beaten]
        dropped.update(id(claim) for claim in rivals if claim.rule.name in beaten)
        rules = tuple(claim.rule.name for claim in left)
        if len(left) > 1:
            contested.setdefault(rules, []).append(left[1])
        elif not left:
            problems.append(
                rivals[0]
                .rule.where("overrides")
                .diagnose(
                    f"{rivals[0].name}: the rules {', '.join(repr(claim.rule.name) for claim in rivals)} override "
                    "each other",
                    "let only one of them override",
                )
            )
    for rules, rivals in contested.items():
        names = listing([claim.name for claim in rivals])
        hint = f"narrow one of them, or let one win: `overrides: [{rules[0]}]` in rule {rules[1]!r}"
        message = f"{names} {'is' if len(rivals) == 1 else 'are'} claimed by the rules {', '.join(map(repr, rules))}"
        problems.append(rivals[0].rule.where("select").diagnose(message, hint))
    return [claim for claim in claims if id(claim) not in dropped]


def _explained(rule: Rule, problems: list[Diagnostic]) -> bool:
    return any(problem.message.startswith(f"rule {rule.name!r}: select") for problem in problems)


def _overridden(rule: Rule, spec: Spec) -> str:
    winners = [other.name for other in spec.rules if rule.name in other.overrides]
    return f"some of its sites went to {', '.join(map(repr, winners))}, which overrides it" if winners else ""
