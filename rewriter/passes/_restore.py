"""restore: the inverse of open, insert, cache and prune, for the sites that are being baked."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Any

from torch import fx

from rewriter.passes._batch import batch_evaluations, dissolve_batches
from rewriter.passes._expand import collapse, groups_of
from rewriter.passes._infra import META, Pass, PassError, Rewriting, evaluations_of, keep_place, note
from rewriter.passes._rows import join_rows
from rewriter.passes._transpose import transpose_once, write_linear_calls
from rewriter.runtime import HANDED, ParametrizedTensor
from rewriter.runtime._rows import written_by_rows
from rewriter.runtime._sites import handed_sites


def restore_graph(rewriting: Rewriting, baked: Set[ParametrizedTensor]) -> None:
    """Make the graph read the baked tensors from their old places again.

    Reads come back under the names and at the places they had, as far as the graph still has those places; calls of
    modules that own no parametrized tensor any more come back as calls.
    """
    transposed = write_linear_calls(rewriting)
    batched = dissolve_batches(rewriting)
    joined = written_by_rows(rewriting.graph)
    kept = {name: site for name, site in rewriting.sites.items() if site not in baked}
    places: list[tuple[fx.Node, dict[str, Any]]] = []
    for site, nodes in evaluations_of(rewriting).items():
        if site in baked:
            places += [(node, place) for node in nodes for place in note(node).get("reads", ())]
    _close_leaves(rewriting, set(kept))
    _take_back_values(rewriting, baked)
    _restore_reads(rewriting, places)
    _replace_rest(rewriting, baked)
    if joined and kept:
        join_rows(dataclasses.replace(rewriting, sites=kept))
    if batched:
        batch_evaluations(rewriting)
    if transposed:
        transpose_once(rewriting)


def _close_leaves(rewriting: Rewriting, kept: set[str]) -> None:
    groups = groups_of(rewriting.graph)
    for node in reversed(list(rewriting.graph.nodes)):  # the parts of an expanded call before the call
        entry = note(node)
        path = entry.get("opened")
        if path is None or any(name.startswith(f"{path}.") for name in kept):
            continue
        given, further = node.args[: entry["arity"]], node.args[entry["arity"] :]
        node.op, node.target = "call_module", path
        node.args = given[: entry["positional"]]
        node.kwargs = {name: given[index] for name, index in entry["keywords"].items()}
        keep_place(node)
        reads: list[fx.Node] = []
        fx.node.map_arg(further, reads.append)
        for read in (*reads, *collapse(rewriting.graph, node, groups.get(node.name, []))):
            _erase_if_ours(rewriting.graph, read)


def _take_back_values(rewriting: Rewriting, baked: Set[ParametrizedTensor]) -> None:
    for node in list(rewriting.graph.nodes):
        if not note(node).get("handed"):
            continue
        left = [site for site in handed_sites(rewriting.module(node.target)) if site not in baked]
        values = [value for value in node.kwargs[HANDED] if isinstance(value, fx.Node)]
        kwargs = {name: value for name, value in node.kwargs.items() if name != HANDED}
        if left:
            sites = {rewriting.paths[site]: site for site in left}
            kwargs[HANDED] = [value for value in values if value.target in sites]
        else:
            keep_place(node)
        node.kwargs = kwargs
        for value in values:
            _erase_if_ours(rewriting.graph, value)


def _restore_reads(rewriting: Rewriting, places: list[tuple[fx.Node, dict[str, Any]]]) -> None:
    graph = rewriting.graph
    by_name = {node.name: node for node in graph.nodes}
    restored: dict[str, fx.Node] = {}
    for value, place in sorted(places, key=lambda pair: pair[1]["rank"]):
        anchor = restored.get(place["before"]) or by_name.get(place["before"])
        if anchor is None:
            continue
        with graph.inserting_before(anchor):
            read = graph.create_node("get_attr", place["target"])
        for name in place["users"]:
            user = by_name.get(name)
            if user is not None and not user._erased and read < user:
                for source in _values(rewriting, value, place["target"]):
                    user.replace_input_with(source, read)
        if place["name"] not in by_name:
            read.name = place["name"]
        by_name[read.name] = read


def _values(rewriting: Rewriting, value: fx.Node, target: str) -> list[fx.Node]:
    """The nodes that stand for one of the tensors of an evaluation."""
    if value._erased:
        return []
    site = rewriting.sites[target]
    if len(site.record.members) == 1:
        same = [value] if site.record.cache != "never" else evaluations_of(rewriting)[site]
        return same
    index = next(index for index, member in enumerate(site.record.members) if target in member.names)
    return [user for user in value.users if user.args == (value, index)]


def _replace_rest(rewriting: Rewriting, baked: Set[ParametrizedTensor]) -> None:
    graph = rewriting.graph
    for site, nodes in evaluations_of(rewriting).items():
        for node in nodes if site in baked else ():
            node.meta.get(META, {}).pop("reads", None)
            node.meta.setdefault(META, {})["site"] = site.record.name
            for value, name in _used_members(site, node):
                with graph.inserting_before(value):
                    value.replace_all_uses_with(graph.create_node("get_attr", name))
            for member in [user for user in node.users if not user.users]:
                graph.erase_node(member)
            _erase_if_ours(graph, node)


def _used_members(site: ParametrizedTensor, node: fx.Node) -> list[tuple[fx.Node, str]]:
    if len(site.record.members) == 1:
        return [(node, site.record.name)] if node.users else []
    members = site.record.members
    return [(user, members[user.args[1]].names[0]) for user in node.users if user.users]  # type: ignore[index]


def _erase_if_ours(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that only our passes could have made and nothing uses any more, and what it alone used."""
    if node._erased or node.users or not note(node).keys() & {"site", "member", "synthetic"}:
        return
    if "reads" in note(node):  # its reads have not come back yet
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for read in inputs:
        _erase_if_ours(graph, read)


def restore_pass(baked: Set[ParametrizedTensor]) -> Pass:
    """Return the pass that takes `baked` out of the graph."""

    def run(rewriting: Rewriting) -> bool:
        restore_graph(rewriting, baked)
        return bool(baked)

    def check(rewriting: Rewriting) -> None:
        for site, nodes in evaluations_of(rewriting).items():
            if site in baked and nodes:
                raise PassError(f"{site.record.name} is still evaluated")
        rewriting.graph.lint()

    return Pass("restore", run, ensures=check)
