"""insert: one evaluation of the chain ahead of every use of a selected tensor, as naive as it sounds."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from rewriter.passes._infra import META, Pass, PassError, Rewriting, note, reads_of
from rewriter.runtime import HANDED, ParametrizedTensor, open_root
from rewriter.runtime._places import SESSION
from rewriter.runtime._sites import handed_sites


def insert_chains(rewriting: Rewriting) -> bool:
    """Put an evaluation before each use, and hand their values to modules that stay whole."""
    by_site: dict[ParametrizedTensor, list[fx.Node]] = {site: [] for site in rewriting.order}
    for read in reads_of(rewriting):
        by_site[rewriting.sites[str(read.target)]].append(read)
    _hand_values(rewriting)
    for site in rewriting.order:
        for read in by_site[site]:
            if _made_for_one_use(read) and _stands_alone(site):
                read.op, read.target = "call_module", rewriting.paths[site]
                read.meta[META] = {"site": site.record.name}
                continue
            users = list(read.users)
            read.meta[META] = {**note(read), "users": [user.name for user in users]}
            for user in users:
                with rewriting.graph.inserting_before(user):
                    value = evaluation(rewriting, site)
                    user.replace_input_with(read, member_of(rewriting, site, value, str(read.target)))
    return bool(rewriting.order)


def _made_for_one_use(read: fx.Node) -> bool:
    """Whether an earlier pass made the read, so that it need not come back, for one call that takes it once."""
    return bool(note(read).get("synthetic")) and len(read.users) == 1


def _stands_alone(site: ParametrizedTensor) -> bool:
    return len(site.record.members) == 1 and not site.record.reads


def evaluation(rewriting: Rewriting, site: ParametrizedTensor) -> fx.Node:
    """Create, at the graph's insertion point, a node that evaluates `site` and the nodes that it reads."""
    inputs: list[fx.Node] = []
    for name in site.record.reads:
        source = rewriting.sites.get(name)
        if source is None:
            read = rewriting.graph.create_node("get_attr", name)
            read.meta[META] = {"synthetic": True}
            inputs.append(read)
        else:
            inputs.append(member_of(rewriting, source, evaluation(rewriting, source), name))
    node = rewriting.graph.create_node("call_module", rewriting.paths[site], tuple(inputs))
    node.meta[META] = {"site": site.record.name}
    return node


def member_of(rewriting: Rewriting, site: ParametrizedTensor, value: fx.Node, name: str) -> fx.Node:
    """Return the node of one of a joint site's tensors; the value itself for an ordinary site."""
    members = site.record.members
    if len(members) == 1:
        return value
    index = next(index for index, member in enumerate(members) if name in member.names)
    node = rewriting.graph.create_node("call_function", operator.getitem, (value, index))
    node.meta[META] = {"member": True}
    return node


def _hand_values(rewriting: Rewriting) -> None:
    for node in list(rewriting.graph.nodes):
        if node.op != "call_module" or node.target not in rewriting.holders or note(node).get("site"):
            continue
        module = rewriting.module(node.target)
        if SESSION not in module.__dict__:
            open_root(module, rewriting.session)
        with rewriting.graph.inserting_before(node):
            values: list[Any] = [evaluation(rewriting, site) for site in handed_sites(module)]
        former = node.kwargs.get(HANDED, ())
        node.kwargs = {**node.kwargs, HANDED: values}
        node.meta[META] = {**note(node), "handed": True}
        for value in former:
            if not value.users:
                rewriting.graph.erase_node(value)


def _every_use_replaced(rewriting: Rewriting) -> None:
    for read in reads_of(rewriting):
        if read.users:
            raise PassError(f"{read.target} is still read by {', '.join(user.name for user in read.users)}")


insert_pass = Pass("insert", insert_chains, ensures=_every_use_replaced)
