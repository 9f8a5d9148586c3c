"""Steps appended to chains of a rewritten model: the earlier steps go on to give what the new ones start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.context import Contexts
from rewriter.errors import PlanError
from rewriter.language import Rule
from rewriter.language._spec import Per
from rewriter.planning._build import build, check_value, describe, options_with
from rewriter.planning._chain import BuildError, Chain
from rewriter.planning._problems import Problems
from rewriter.planning._resolve import Claim
from rewriter.planning._together import planned_together
from rewriter.sites import Chunked, Site, SiteSpec
from rewriter.sites._assemble import reassemble
from rewriter.sites._assign import check_reached, invert
from rewriter.sites._bridge import copy_of

_KEYS = {"name", "select", "chain", "exclude", "expect", "init"}


@dataclass
class Longer:
    """A site with further steps, worked out aside; `apply` puts it in place.

    Arguments:
        site: the site as it is.
        steps: the further steps.
        originals: what they store.
        contents: tensors of the site with their new contents.
        record: of the longer chain.
    """

    site: Site
    steps: list[nn.Module]
    originals: list[Tensor]
    contents: list[tuple[Tensor, Tensor]]
    record: SiteSpec

    @torch.no_grad()
    def apply(self) -> None:
        """Append the steps."""
        site = self.site
        for tensor, content in self.contents:
            tensor.copy_(content)
        own, rest = _parted(site)
        steps, originals = [*site.steps, *self.steps], [*own, *self.originals]
        if any(getattr(step, "freezes_original", False) for step in steps):
            for original in originals:
                original.requires_grad_(False)
        reassemble(site, steps, [*originals, *rest], self.record)


@torch.no_grad()
def longer_sites(rule: Rule, claims: Sequence[Claim]) -> list[Longer]:
    """Return the sites of the claims with the steps of `rule` appended. Nothing changes before `Longer.apply`.

    Arguments:
        rule: has the name of the rule that the sites belong to.
        claims: its claims, on tensors that have sites.

    Raises:
        PlanError: the steps do not fit, or the chains cannot give what the steps start from; every reason is listed.
    """
    _refuse_options(rule)
    problems = Problems()
    sites: dict[int, Site] = {}
    values: dict[str, Tensor] = {}
    further: list[Claim] = []
    for claim in claims:
        site = claim.entries[0].site
        if site is None or site.spec.rule != rule.name:
            raise PlanError.of(
                [
                    rule.where("select").diagnose(
                        f"the model has a rule {rule.name!r} already, and {claim.name} is none of its tensors: "
                        "give the further rule another name",
                        "to append steps to the chains of that rule, select its tensors alone",
                    )
                ]
            )
        problem = _why_not(site, rule)
        if problem:
            problems.build_failed(claim, problem)
            continue
        value = values[site.spec.name] = site.read(*site.read_inputs())
        further.append(_claim(claim, rule, site.spec, value))
        sites[id(further[-1])] = site
    problems.raise_any()
    masks = {id(claim): _last_masks(sites[id(claim)]) for claim in further}
    chains = planned_together(further, values, masks)
    found: list[Longer] = []
    for claim in further:
        try:
            chain = chains.get(id(claim)) or Chain(claim, values)
            part = build(claim, describe(claim.rule), Contexts(), chain=chain)
            check_value(claim, part, values, measure=False)
            found.append(_joined(sites[id(claim)], part, chain.value, claim.rule))
        except BuildError as problem:
            problems.build_failed(claim, str(problem))
    problems.raise_any()
    return found


def _refuse_options(rule: Rule) -> None:
    fields = type(rule).model_fields
    others = [fields[key].alias or key for key in fields if key in rule.model_fields_set - _KEYS]
    if others:
        raise PlanError.of(
            [
                rule.where(others[0]).diagnose(
                    f"the steps are appended to chains of rule {rule.name!r}, which decides on "
                    f"{', '.join(f'`{key}`' for key in others)}",
                    "leave the key out, or bake the sites and rewrite them with one rule",
                )
            ]
        )


def _why_not(site: Site, rule: Rule) -> str:
    labels = {step.label for step in rule.chain if step.label} & set(site.spec.labels)
    if len(site.spec.members) > 1:
        return "a `joint` chain gives several tensors, and no steps can be appended to it"
    if site.trained_before is not None:
        return "the site is frozen; unfreeze it first"
    if "share=True" in site.spec.options:
        return "the chains share their steps (`share: true`); bake them, and rewrite them with the longer chain"
    if rule.init == "sample" or any(step.inputs for step in rule.chain):
        return "appended steps take no `inputs`, and `init` is `keep` or `raw`; bake the site, and rewrite it"
    return f"the chain has the label {labels.pop()!r} already" if labels else ""


def _claim(claim: Claim, rule: Rule, record: SiteSpec, value: Tensor) -> Claim:
    """Return a claim on the value of a site, as on a plain tensor: the steps start from the site's value."""
    layout = record.layout
    only = {"only": layout.only} if layout.only else {}
    view = {
        "source": record.name,
        "per": Per(dim=layout.dim, chunks=layout.chunks, **only) if layout.chunks else None,
        "reshape": layout.matrix or None,
        "trainable": record.trainable,
    }
    return Claim(rule.model_copy(update=view), [replace(claim.entries[0], tensor=value, site=None)])


def _last_masks(site: Site) -> list[nn.Module]:
    """Return the masks at the end of a chain, beside which a mask that is appended chooses."""
    masks: list[nn.Module] = []
    for step in reversed(site.steps):
        if not all(getattr(part, "masks", False) is True for part in (step if isinstance(step, Chunked) else [step])):
            break
        masks.append(step)
    return masks


def _parted(site: Site) -> tuple[list[Tensor], list[Tensor]]:
    """Return the originals of the chain, and the one of the chunks that no chain computes."""
    originals = site.originals
    return (originals[:-1], originals[-1:]) if site.spec.layout.only else (originals, [])


def _joined(site: Site, part: Site, wanted: Any, rule: Rule) -> Longer:
    """Return `site` with the steps of `part`; its own steps have to give `wanted`."""
    record, originals = site.spec, _parted(part)[0]
    if part.spec.outer:
        originals[0] = nn.Parameter(record.layout.part.inward(originals[0]), originals[0].requires_grad)
    longer = replace(
        record,
        chain=(*record.chain, *part.spec.chain),
        labels=(*record.labels, *part.spec.labels),
        options=options_with(record, rule),
        stored=(*record.stored, *part.spec.stored),
        carries=(*record.carries, *part.spec.carries),
        inputs=(*record.inputs, *part.spec.inputs),
    )
    return Longer(site, part.steps, originals, _contents(site, wanted), longer)


def _contents(site: Site, wanted: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return what the site's tensors have to contain so that its chain gives `wanted`, in the chain's own view."""
    layout, inputs = site.spec.layout, site.read_inputs()
    value = site.read(*inputs)
    now = value if layout.plain else layout.inward(value)
    if wanted.shape != now.shape:
        raise BuildError(
            f"the new steps start from a tensor of shape {list(wanted.shape)}, and the chain gives {list(now.shape)}"
        )
    if torch.equal(wanted.to(now), now):
        return []
    clone, rest = copy_of(site), _parted(site)[1]
    target = wanted.to(now) if layout.plain else layout.outward(wanted.to(now), *rest)
    try:
        for original, source in zip(clone.originals, invert(clone, target, inputs), strict=True):
            original.copy_(source)
        check_reached(clone, target, clone.evaluate(*inputs))
    except Exception as problem:
        raise BuildError(
            f"the chain {' >> '.join(site.spec.chain)} cannot give what the new steps start from: {problem} (with "
            "`init: raw` it stays as it is, and the value changes)"
        ) from problem
    before, after = ([*one.parameters(), *one.buffers()] for one in (site, clone))
    return [*zip(before, after, strict=True)]
