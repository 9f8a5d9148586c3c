"""open: calls of torch.nn leaves that own selected tensors become functions of their tensors."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from rewriter.capture import Opened, Own, bind_call, has_hooks, opener_of, reads_every_site
from rewriter.passes._infra import META, Pass, PassError, Rewriting, call_note, unhand


def open_leaves(rewriting: Rewriting) -> bool:
    """Open every call that can be opened; the others are handed their values by a later pass."""
    opened = False
    reads: dict[str, fx.Node] = {}
    for node in list(rewriting.graph.nodes):
        if node.op == "call_module" and node.target in rewriting.holders:
            module = rewriting.module(node.target)
            function = _opened(module)
            if function is not None:
                _open(rewriting, node, module, function, reads)
                opened = True
    return opened


def _opened(module: nn.Module) -> Opened | None:
    """Return the module as a function of its tensors, if it is one of all those that are computed."""
    opener = opener_of(module)
    if opener is None or has_hooks(module):
        return None
    opened = opener(module)
    return opened if opened is not None and reads_every_site(module, opened) else None


def _open(rewriting: Rewriting, node: fx.Node, module: nn.Module, opened: Opened, reads: dict[str, fx.Node]) -> None:
    unhand(node)
    path = str(node.target)
    given = bind_call(module, node.args, node.kwargs)
    graph = rewriting.graph
    with graph.inserting_before(node):

        def read(argument: Any) -> Any:
            return _read(rewriting, module, path, argument.name, reads) if isinstance(argument, Own) else argument

        further = map_aggregate(opened.arguments, read)
    node.meta[META] = call_note(node, given)
    node.op, node.target = "call_function", opened.function
    node.args = (*given, *further)
    if node.kwargs:
        node.kwargs = {}


def _read(rewriting: Rewriting, module: nn.Module, path: str, name: str, reads: dict[str, fx.Node]) -> fx.Node | None:
    """Return the node that reads one of the module's attributes: the first one made, since the graph runs down."""
    target = f"{path}.{name}"
    if target in reads:
        return reads[target]
    if target not in rewriting.sites:
        submodule, _, tensor = name.rpartition(".")
        owner = module.get_submodule(submodule) if submodule else module
        slots = next(s for s in (owner._parameters, owner._buffers, owner.__dict__) if tensor in s)
        if slots[tensor] is None:
            return None
    node = reads[target] = rewriting.graph.create_node("get_attr", target)
    node.meta[META] = {"synthetic": True}
    return node


def _nothing_left_to_open(rewriting: Rewriting) -> None:
    for node in rewriting.graph.nodes:
        if node.op == "call_module" and node.target in rewriting.holders:
            module = rewriting.module(node.target)
            if _opened(module) is not None:
                raise PassError(f"{node.target} is still called as a module")


open_pass = Pass("open", open_leaves, ensures=_nothing_left_to_open)
