"""Tensors that no chain can compute.

FSDP puts the parameters of a sharded module in place at each forward. What a forward writes to a tensor cannot last: a
computed tensor has no memory of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from rewriter._given import fsdp_classes
from rewriter._torch import OpOverload
from rewriter.errors import Diagnostic
from rewriter.planning._problems import Problems
from rewriter.planning._resolve import Claim

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_NORMS = (nn.modules.batchnorm._NormBase,)
_IN_PLACE = frozenset(
    getattr(operator, name) for name in vars(operator) if name.startswith("i") and hasattr(operator, f"__{name}__")
)
_VIEWS = frozenset(
    "data T mT H mH real imag detach view view_as reshape flatten unflatten squeeze unsqueeze transpose t permute "
    "swapaxes swapdims movedim expand expand_as select narrow getitem chunk split tensor_split unbind diagonal "
    "as_strided unfold".split()
)
_HINT_FOR_A_WEIGHT = "leave it out with `except`, or let a step of the chain do what the forward does to it"
_HINT = "leave it out with `except`; what a forward accumulates is not a weight"


def refuse_statistics(claim: Claim, problems: Problems) -> bool:
    """Say whether a claim is on statistics that torch's norms update in training forwards, and add the problem."""
    for entry in claim.entries:
        if any(isinstance(owner, _NORMS) and tensor in _STATISTICS for owner, tensor in entry.owners):
            rest = "a forward in train mode updates {} in place, and a computed tensor cannot keep the update"
            problems.about(
                claim,
                "select",
                f"a running statistic: {rest.format('it')}",
                _HINT,
                entry.name,
                f"running statistics: {rest.format('them')}",
            )
            return True
    return False


def refuse_writes(claims: Sequence[Claim], graph: fx.Graph | None) -> list[Diagnostic]:
    """Return complaints about claims on tensors that the graph writes to, themselves or through a view."""
    claimed = {name: claim for claim in claims for entry in claim.entries for name in entry.names}
    problems = []
    for node in graph.nodes if graph is not None and claimed else ():
        if node.op == "get_attr" and node.target in claimed:
            found = writer(node)
            if found is not None:
                problems.append(
                    claimed[node.target].rule.where("select")
                    .diagnose(
                        f"the forward changes {node.target} in place ({found.name}), and a computed tensor cannot "
                        "keep the change",
                        _HINT if claimed[node.target].entries[0].infos[0].kind == "buffer" else _HINT_FOR_A_WEIGHT,
                    )
                )  # fmt: skip
    return problems


def writer(node: fx.Node) -> fx.Node | None:
    """Return a node that writes to what `node` gives."""
    for user in node.users:
        if _writes(user, node):
            return user
        found = writer(user) if _views(user, node) else None
        if found is not None:
            return found
    return None


def _writes(user: fx.Node, node: fx.Node) -> bool:
    if isinstance(user.target, OpOverload):
        return any(info is not None and info.is_write for info in _aliases(user, node))
    if user.kwargs.get("out") is node:
        return True
    first = user.args[0] if user.args else user.kwargs.get("tensor", user.kwargs.get("input"))
    if first is not node:
        return False
    if user.op == "call_method":
        name = str(user.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if user.op == "call_function":
        name = getattr(user.target, "__name__", "")
        return user.target is operator.setitem or user.target in _IN_PLACE or name.rstrip("_") + "_" == name
    return False


def _views(user: fx.Node, node: fx.Node) -> bool:
    """Whether what `user` gives lies in the memory of what `node` gives."""
    if isinstance(user.target, OpOverload):
        return any(info is not None for info in _aliases(user, node))
    if not user.args or user.args[0] is not node:
        return False
    if user.target is getattr:
        return user.args[1] in _VIEWS
    name = str(user.target) if user.op == "call_method" else getattr(user.target, "__name__", "")
    return name in _VIEWS


def _aliases(user: fx.Node, node: fx.Node) -> list[Any]:
    """Return the aliases that the schema of `user` declares for those of its arguments that are `node`."""
    arguments = user.target._schema.arguments  # type: ignore[union-attr]
    given = [*zip(arguments, user.args, strict=False), *((a, user.kwargs.get(a.name)) for a in arguments)]
    return [argument.alias_info for argument, value in given if value is node]


def refuse_sharded(model: nn.Module, claims: Sequence[Claim], problems: Problems) -> None:
    """Refuse claims on tensors of modules that are sharded already."""
    kinds = fsdp_classes()
    sharded = [path for path, module in model.named_modules() if isinstance(module, kinds)] if kinds else []
    inside = tuple(f"{path}." if path else "" for path in sharded)
    for claim in claims if inside else ():
        if any(name.startswith(inside) for entry in claim.entries for name in entry.names):
            problems.about(
                claim,
                "select",
                "sharded by FSDP, which puts the parameter itself in place at each forward",
                "rewrite the model first, then shard it",
            )
