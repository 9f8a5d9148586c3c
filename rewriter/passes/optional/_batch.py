"""batch: equal chains over equal shapes, or steps of classes that can, are evaluated in one call where it pays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.context._fingerprint import declares
from rewriter.context._random import nothing_drawn
from rewriter.context._replay import buffer_marks, buffers_changed
from rewriter.passes._infra import Lowering, Pass, PassError, evaluations_of
from rewriter.passes.optional._costs import FEWEST, small
from rewriter.sites import Site
from rewriter.sites._batch import BatchedEvaluation, evaluate_together, joint, likeness, stacked
from rewriter.sites._places import BATCHES

PROBES = 8
"""How many sites of a group are compared with what they give alone."""
NEIGHBOURS = 64
"""How many are compared with what they give in a batch of so many."""


def batch_evaluations(lowering: Lowering) -> bool:
    """Give the evaluations of every group of equal sites one node that does their work."""
    evaluations = evaluations_of(lowering).items()
    nodes = {site: found[0] for site, found in evaluations if len(found) == 1 and "apart" not in found[0].kwargs}
    ordered = sorted(nodes, key=nodes.__getitem__)
    groups = groups_to_batch(s for s in ordered if s.spec.batch == "always" or small(s.originals, s.steps))
    chosen = [group for group in groups if (group[0].spec.batch == "always" or len(group) >= FEWEST) and _equal(group)]
    if chosen:
        lowering.root.add_module(BATCHES, nn.ModuleList(map(BatchedEvaluation, chosen)))
    for index, group in enumerate(chosen):
        with lowering.graph.inserting_before(nodes[group[0]]):
            batch = lowering.graph.create_node("call_module", f"{BATCHES}.{index}")
        for slot, site in enumerate(group):
            nodes[site].kwargs = {**nodes[site].kwargs, "batch": batch, "slot": slot}
    return bool(chosen)


def is_batch(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node evaluates several sites at once."""
    if BATCHES not in root._modules or node.op != "call_module" or not str(node.target).startswith(f"{BATCHES}."):
        return False
    return isinstance(root.get_submodule(str(node.target)), BatchedEvaluation)


def why_alone(site: Site) -> str:
    """Return why the site's value cannot come out of a batch; nothing where it can."""
    record = site.spec
    if record.cache != "forward":
        return f"`cache: {record.cache}` decides for each tensor when it is evaluated"
    if record.memory != "keep":
        return f"`memory: {record.memory}` evaluates each tensor again by itself"
    if joint(site):
        return ""
    if len(record.members) > 1 or len(site.original_names) > 1:
        return "the chain is no function of one stored tensor"
    if record.reads:
        return "the chain reads other tensors"
    for step, name in zip(site.steps, record.chain, strict=True):
        parts = step.modules() if step._modules else (step,)
        if any(declares(part, "stateful") or declares(part, "random") for part in parts):
            return f"{name} advances a state or draws random numbers"
        if not declares(step, "batched"):
            return f"{name} is not for several tensors at once (its class does not say `batched = True`)"
    return "its first steps are not evaluated in every forward" if site.hoisted else ""


def groups_to_batch(sites: Iterable[Site]) -> list[list[Site]]:
    """Return the groups of two and more of the sites that are alike: equal chains over tensors of equal form."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        if site.spec.batch != "never" and not why_alone(site):
            groups.setdefault((site.spec.identity, likeness(site)), []).append(site)
    return [group for group in groups.values() if len(group) > 1]


def _equal(group: Sequence[Site]) -> bool:
    """Whether the batch gives what each site gives by itself: a step may say `batched` and not be.

    Raises:
        PassError: it does not, and the rule says `batch: always`.
    """
    problem = why_not_equal(group)
    if problem and group[0].spec.batch == "always":
        raise PassError(f"{group[0].spec.name}: {problem}")
    return not problem


def why_not_equal(group: Sequence[Site]) -> str:
    """Return in which way a batch of the sites does not give what each of them gives; nothing where it does."""
    if joint(group[0]):
        return ""  # the shapes differ, and what is evaluated together at each forward is a matter of the class
    try:
        with torch.no_grad(), nothing_drawn(group[0].originals):
            return _difference(group)
    except Exception as failure:
        return f"the chain cannot be batched: {failure}"


def _difference(group: Sequence[Site]) -> str:
    """Return in which way a batch of the sites differs from single evaluations; nothing if it does not.

    Whether a chain broadcasts is a property of its code. The sites of a group run the same code, with the same
    settings, over tensors of the same form; they differ in numbers alone, which the next step of an optimizer
    changes. So comparing thousands of them with themselves alone would prove no more than comparing a few. What a
    few do not show so well is a step that lets one site's numbers reach another's value: that is why some more are
    compared with what they give among fewer neighbours. Beside the one batch that there will be, the number of
    evaluations does not grow with the group.
    """
    value = _batched(group)
    if value.is_meta:
        return ""
    if _advances_a_state(group):
        return "a step changes its buffers as it runs, and in a batch the change would be lost"
    probes = _spread(len(group), PROBES)
    alone = [_alone(group[index]) for index in probes]
    if any(part.shape != value.shape[1:] for part in alone) or not _close(value[probes], torch.stack(alone)):
        return "the chain gives other values in a batch than alone"
    some = _spread(len(group), NEIGHBOURS)
    if len(probes) < len(some) < len(group) and not _close(value[some], _batched([group[index] for index in some])):
        return "the chain gives other values in a batch than in a smaller one"
    return ""


def _spread(count: int, wanted: int) -> list[int]:
    """Return so many indices below `count`, first and last among them; all of them where there are no more."""
    return sorted({index * (count - 1) // (wanted - 1) for index in range(wanted)})


def _batched(sites: Sequence[Site]) -> Tensor:
    return torch.stack([*evaluate_together(sites)])


def _alone(site: Site) -> Tensor:
    """Return the value that the site gives alone, in the mode it is in; its state stays."""
    copy = site.settled()
    for part, original in zip(copy.modules(), site.modules(), strict=True):
        part.training = original.training
    value: Tensor = copy.evaluate()
    return value


def _advances_a_state(group: Sequence[Site]) -> bool:
    """Whether the chain writes to buffers in train mode, without saying that it is `stateful`."""
    value, steps = stacked(group[:1])
    holders = [part for step in steps for part in step.modules() if part._buffers]  # all of them copies
    for part in holders:
        part.training = True
    before = [(part, buffer_marks(part)) for part in holders]
    for step in steps:
        value = step(value)
    return any(buffers_changed(part, marks) for part, marks in before)


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, *_tolerances(other))


def _tolerances(value: torch.Tensor) -> tuple[float, float]:
    """Rounding differs between a matrix product and a batch of them, and nothing else may."""
    rounding = torch.finfo(value.dtype).eps if value.is_floating_point() or value.is_complex() else 0.0
    return 1e2 * rounding, 1e2 * rounding


def _each_has_its_slot(lowering: Lowering) -> None:
    for node in lowering.graph.nodes:
        if is_batch(lowering.root, node):
            sites: Any = lowering.root.get_submodule(str(node.target))
            paths = [lowering.paths[site] for site in sites.sites]
            if [paths[user.kwargs["slot"]] for user in node.users] != [user.target for user in node.users]:
                raise PassError(f"{node.target} gives its values to other sites than it computes")


batch_pass = Pass("batch", batch_evaluations, ensures=_each_has_its_slot)
