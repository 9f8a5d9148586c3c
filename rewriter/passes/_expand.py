"""expand: calls of torch.nn modules that own selected tensors through their parts become calls of the parts."""

from __future__ import annotations

from torch import fx

from rewriter.capture import Expanded, Parts, bind_call, expansion_of
from rewriter.passes._infra import META, Pass, PassError, Rewriting, call_note, note, unhand


def expand_calls(rewriting: Rewriting) -> bool:
    """Expand every call that can be expanded, and those that appear by it."""
    expanded = False
    pending = list(rewriting.graph.nodes)
    while pending:
        node = pending.pop()
        found = _expansion(rewriting, node)
        if found is not None:
            pending += _expand(rewriting, node, found)
            expanded = True
    return expanded


def _expansion(rewriting: Rewriting, node: fx.Node) -> Expanded | None:
    if node.op != "call_module" or node.target not in rewriting.holders:
        return None
    return expansion_of(rewriting.module(node.target))


def _expand(rewriting: Rewriting, node: fx.Node, expanded: Expanded) -> list[fx.Node]:
    """Make `node` the entry of its group, and write the rest of the group after it."""
    unhand(node)
    graph, follower, users = rewriting.graph, node.next, list(node.users)
    parts = Parts(graph, str(node.target))
    given = bind_call(rewriting.module(node.target), node.args, node.kwargs)
    node.meta[META] = call_note(node, given)
    node.op, node.target = "call_function", expanded.entry
    node.args, node.kwargs = (*given, *expanded.settings), {}
    with graph.inserting_before(follower):
        result: fx.Node = expanded.body(parts, parts.value(node), tuple(map(parts.value, given))).node
    group: list[fx.Node] = []
    part = node.next
    while part is not follower:
        part.meta[META] = {"part": node.name}
        group.append(part)
        part = part.next
    result.meta[META] = {"part": node.name, "result": True}
    for user in users:
        user.replace_input_with(node, result)
    return group


def groups_of(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return the nodes that each expanded call became, but for its entry, by the entry's name."""
    groups: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if "part" in note(node):
            groups.setdefault(note(node)["part"], []).append(node)
    return groups


def collapse(graph: fx.Graph, entry: fx.Node, group: list[fx.Node]) -> list[fx.Node]:
    """Take a group out of the graph again; return the nodes that it used and that may be unused now.

    The entry is then the group's value: its caller makes it the call that it was.
    """
    for node in group:
        if note(node).get("result"):
            node.replace_all_uses_with(entry)
    used: dict[fx.Node, None] = {}
    for node in reversed(group):
        used.update(dict.fromkeys(node.all_input_nodes))
        graph.erase_node(node)
    return [node for node in used if not node._erased and node is not entry]


def _nothing_left_to_expand(rewriting: Rewriting) -> None:
    for node in rewriting.graph.nodes:
        if _expansion(rewriting, node) is not None:
            raise PassError(f"{node.target} is still one call")


expand_pass = Pass("expand", expand_calls, ensures=_nothing_left_to_expand)
