"""Prove on the new sites what the passes will assume of their chains, before the model changes.

A step declares that it merges with its neighbour, or that it takes several tensors at once. A wrong declaration is
an error of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor

from rewriter.capture import Capture
from rewriter.errors import Diagnostic
from rewriter.language import Rule
from rewriter.passes import (
    few_of_each,
    fuse,
    groups_to_batch,
    hoist,
    why_alone,
    why_not_equal,
    why_not_fused,
    why_not_hoisted,
)
from rewriter.sites import Site

Inputs = Callable[[Site], Sequence[Tensor]]


def prove(
    sites: Sequence[Site], rules: Mapping[str, Rule], inputs: Inputs, without: Collection[str]
) -> list[Diagnostic]:
    """Decide which steps are hoisted and fused, and return what is not as the steps say.

    Arguments:
        sites: that were built.
        rules: by name; an absorbed site has none.
        inputs: a site → the tensors that it reads.
        without: passes that are left out.
    """
    found: dict[tuple[str, str], Diagnostic] = {}
    for name, decide, why_not in (("hoist", hoist, why_not_hoisted), ("fuse", fuse, why_not_fused)):
        if name not in without and decide(sites):
            for site in few_of_each(sites):
                problem = why_not(site, inputs(site))
                if problem:
                    found.setdefault((name, site.spec.rule), _problem(rules, site, "chain", problem))
    return list(found.values())


def prove_batches(
    sites: Iterable[Site], rules: Mapping[str, Rule], way: Capture, without: Collection[str]
) -> list[Diagnostic]:
    """Return which rules say ``batch: always`` of tensors that cannot be evaluated together.

    Arguments:
        sites: of the model, once it is rewritten.
        rules: by name.
        way: how the model is captured.
        without: passes that are left out.
    """
    owned: dict[str, list[Site]] = {}
    for site in sites:
        if site.spec.batch == "always" and site.spec.rule in rules:
            owned.setdefault(site.spec.rule, []).append(site)
    problems = []
    for own in owned.values() if "batch" not in without else ():
        problem = _why_not_batched(own, way)
        if problem:
            problems.append(_problem(rules, own[0], "batch", f"`batch: always` is not possible: {problem}"))
    return problems


def _why_not_batched(sites: Sequence[Site], way: Capture) -> str:
    if way.root != "graph":
        return f"it takes a graph of the model, which is captured as {way.root} ({way.why})"
    groups = groups_to_batch(sites)
    if not groups:
        alone = next(filter(None, map(why_alone, sites)), "")
        return alone or "the rule has no two tensors with equal chains over equal shapes"
    return next(filter(None, map(why_not_equal, groups)), "")


def _problem(rules: Mapping[str, Rule], site: Site, key: str, text: str) -> Diagnostic:
    message = f"{site.spec.name}: {text}"
    rule = rules.get(site.spec.rule)
    return Diagnostic(message) if rule is None else rule.where(key).diagnose(message)
