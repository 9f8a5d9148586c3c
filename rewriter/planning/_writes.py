"""Buffers that a forward writes to: a computed tensor has no memory of its own in which that could last."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx, nn

from rewriter.errors import Diagnostic
from rewriter.planning._resolve import Claim
from rewriter.planning._survey import Entry

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_NORMS = (nn.modules.batchnorm._NormBase,)
_IN_PLACE = frozenset(
    getattr(operator, name) for name in vars(operator) if name.startswith("i") and hasattr(operator, f"__{name}__")
)
_HINT = "leave it out with `except`; what a forward accumulates is not a weight"


def running_statistic(entry: Entry) -> bool:
    """Say whether a tensor is one of the statistics that torch's norms update in each training forward."""
    return any(isinstance(owner, _NORMS) and tensor in _STATISTICS for owner, tensor in entry.owners)


def refuse_statistics(claim: Claim) -> Diagnostic | None:
    """Return the complaint about a claim on running statistics, if it makes one."""
    for entry in claim.entries:
        if running_statistic(entry):
            return claim.rule.where("select").diagnose(
                f"{entry.name} is a running statistic: a forward in train mode updates it in place, and a computed "
                "tensor cannot keep the update",
                _HINT,
            )
    return None


def refuse_writes(claims: Sequence[Claim], graph: fx.Graph | None) -> list[Diagnostic]:
    """Return complaints about claims on buffers that the graph writes to."""
    buffers = {
        name: claim
        for claim in claims
        for entry in claim.entries
        for name in entry.names
        if entry.infos[0].kind == "buffer"
    }
    problems = []
    for node in graph.nodes if graph is not None and buffers else ():
        if node.op == "get_attr" and node.target in buffers:
            writer = next((user for user in node.users if _writes(user, node)), None)
            if writer is not None:
                problems.append(
                    buffers[node.target].rule.where("select")
                    .diagnose(
                        f"the forward changes {node.target} in place ({writer.name}), and a computed tensor cannot "
                        "keep the change",
                        _HINT,
                    )
                )  # fmt: skip
    return problems


def _writes(user: fx.Node, node: fx.Node) -> bool:
    if user.kwargs.get("out") is node:
        return True
    if not user.args or user.args[0] is not node:
        return False
    if user.op == "call_method":
        name = str(user.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if user.op == "call_function":
        name = getattr(user.target, "__name__", "")
        return user.target is operator.setitem or user.target in _IN_PLACE or name.rstrip("_") + "_" == name
    return False
