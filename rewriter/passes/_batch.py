"""batch: equal chains over equal shapes are evaluated in one call, where that is measured to pay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from rewriter.passes._costs import pays
from rewriter.passes._infra import META, Pass, PassError, Rewriting, evaluations_of
from rewriter.runtime import ParametrizedTensor
from rewriter.runtime._batch import BatchedEvaluation, alike, evaluate_together

HOME = "batched_evaluations"


def batch_evaluations(rewriting: Rewriting) -> bool:
    """Give the evaluations of every group of equal sites one node that does their work."""
    dissolve_batches(rewriting)
    evaluations = evaluations_of(rewriting).items()
    nodes = {site: found[0] for site, found in evaluations if len(found) == 1 and can_batch(site)}
    order = {node: index for index, node in enumerate(rewriting.graph.nodes)}
    groups: list[list[ParametrizedTensor]] = []
    for site in sorted(nodes, key=lambda site: order[nodes[site]]):
        group = next((group for group in groups if _together(group[0], site)), None)
        groups.append([site]) if group is None else group.append(site)
    chosen = [group for group in groups if len(group) > 1 and _wanted(group) and _equal(group)]
    if chosen:
        rewriting.root.add_module(HOME, nn.ModuleList(map(BatchedEvaluation, chosen)))
    for index, group in enumerate(chosen):
        with rewriting.graph.inserting_before(nodes[group[0]]):
            batch = rewriting.graph.create_node("call_module", f"{HOME}.{index}")
        batch.meta[META] = {"member": True}
        for slot, site in enumerate(group):
            nodes[site].kwargs = {**nodes[site].kwargs, "batch": batch, "slot": slot}
    return bool(chosen)


def dissolve_batches(rewriting: Rewriting) -> bool:
    """Take every batch out again, so that each site is evaluated by itself."""
    batches = [node for node in rewriting.graph.nodes if is_batch(rewriting.root, node)]
    for batch in batches:
        for node in list(batch.users):
            node.kwargs = {name: value for name, value in node.kwargs.items() if name not in ("batch", "slot")}
        rewriting.graph.erase_node(batch)
    if batches:
        del rewriting.root._modules[HOME]
    return bool(batches)


def is_batch(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node evaluates several sites at once."""
    if HOME not in root._modules or node.op != "call_module" or not str(node.target).startswith(f"{HOME}."):
        return False
    return isinstance(root.get_submodule(str(node.target)), BatchedEvaluation)


def can_batch(site: ParametrizedTensor) -> bool:
    """Whether the site's chain is a function of one stored tensor that broadcasts over leading dimensions."""
    record = site.record
    return (
        record.cache == "forward"
        and record.memory == "keep"
        and record.batch != "never"
        and not site.hoisted
        and not record.reads
        and len(record.members) == 1
        and len(site.originals) == 1
        and all(_broadcasts(step) for step in site.steps)
    )


def _broadcasts(step: Any) -> bool:
    return bool(getattr(step, "batched", False)) and not any(
        getattr(module, "stateful", False) or getattr(module, "random", False) for module in step.modules()
    )


def _together(one: ParametrizedTensor, other: ParametrizedTensor) -> bool:
    return one.record.identity == other.record.identity and alike([one, other])


def _wanted(group: Sequence[ParametrizedTensor]) -> bool:
    first = group[0]
    return first.record.batch == "always" or pays(len(group), first.originals[0], first.steps)


@torch.no_grad()
def _equal(group: Sequence[ParametrizedTensor]) -> bool:
    """Whether the batch gives what each site gives by itself: a step may say `batched` and not be."""
    try:
        together = evaluate_together([site.settled() for site in group])
    except Exception as problem:
        if group[0].record.batch == "always":
            raise PassError(f"{group[0].record.name}: the chain cannot be batched: {problem}") from problem
        return False
    for site, value in zip(group, together, strict=True):
        alone = site.read()
        if value.is_meta:
            continue
        if value.shape != alone.shape or not torch.allclose(value, alone, *_tolerances(alone)):
            if site.record.batch == "always":
                raise PassError(f"{site.record.name}: the chain gives other values in a batch than alone")
            return False
    return True


def _tolerances(value: torch.Tensor) -> tuple[float, float]:
    """Rounding differs between a matrix product and a batch of them, and nothing else may."""
    rounding = torch.finfo(value.dtype).eps if value.is_floating_point() or value.is_complex() else 0.0
    return 1e2 * rounding, 1e2 * rounding


def _each_has_its_slot(rewriting: Rewriting) -> None:
    for node in rewriting.graph.nodes:
        if is_batch(rewriting.root, node):
            sites: Any = rewriting.root.get_submodule(str(node.target))
            paths = [rewriting.paths[site] for site in sites.sites]
            if [paths[user.kwargs["slot"]] for user in node.users] != [user.target for user in node.users]:
                raise PassError(f"{node.target} gives its values to other sites than it computes")


batch_pass = Pass("batch", batch_evaluations, ensures=_each_has_its_slot)
