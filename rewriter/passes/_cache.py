"""cache: the evaluations of a site become one node, where the tensor was read first.

That place dominates every use, since a graph runs from top to bottom, and it is where the unrewritten model read the
tensor first: a chain that draws random numbers or advances a state does so in the order it would have.
"""

from __future__ import annotations

from torch import fx

from rewriter.passes._infra import META, Pass, PassError, Rewriting, evaluations_of, note, reads_of
from rewriter.runtime import ParametrizedTensor


def merge_evaluations(rewriting: Rewriting) -> bool:
    """Merge the evaluations of every site whose policy is not ``never``."""
    first_read: dict[ParametrizedTensor, fx.Node] = {}
    for read in reads_of(rewriting):
        first_read.setdefault(rewriting.sites[str(read.target)], read)
    merged = False
    found = evaluations_of(rewriting)
    for site in rewriting.order:
        nodes = [node for node in found[site] if not node._erased]
        if site.record.cache == "never" or not nodes:
            continue
        kept, *others = nodes
        place = min(kept, first_read.get(site, kept))
        if place is not kept:
            _move(kept, place)
        for node in others:
            node.replace_all_uses_with(kept)
            if "reads" in note(node):
                kept.meta[META].setdefault("reads", []).extend(note(node)["reads"])
            _erase_with_inputs(rewriting.graph, node)
        merged = merged or bool(others)
    return merged


def _move(node: fx.Node, place: fx.Node) -> None:
    """Move `node` ahead of `place`, with the reads and evaluations that were made for it alone."""
    for read in node.all_input_nodes:
        _move(read, place)
    place.prepend(node)


def _erase_with_inputs(graph: fx.Graph, node: fx.Node) -> None:
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for read in inputs:
        if not read.users:
            _erase_with_inputs(graph, read)


def _one_each(rewriting: Rewriting) -> None:
    for site, nodes in evaluations_of(rewriting).items():
        if site.record.cache != "never" and len(nodes) > 1:
            raise PassError(f"{site.record.name} is evaluated {len(nodes)} times")


cache_pass = Pass("cache", merge_evaluations, ensures=_one_each)
