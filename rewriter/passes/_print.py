"""A graph as text with canonical names: equal text means equal graphs, whatever the nodes were called."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from rewriter.sites import Site
from rewriter.sites._batch import BatchedEvaluation


def print_graph(model: fx.GraphModule, *, graph: fx.Graph | None = None) -> str:
    """Return one line for each node of a graph, chains written out where they are evaluated.

    >>> import torch, rewriter
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    >>> spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
    >>> print(print_graph(rewriter.rewrite(model, spec)))
    %1 = input
    %2 = evaluate 0.weight: original >> symmetric
    %3 = 0.bias
    %4 = linear(%1, %2, %3)
    return %4

    Arguments:
        model: whose modules and tensors the graph names.
        graph: instead of the model's own.
    """
    numbers: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in (graph or model.graph).nodes:
        text = _operation(model, node, numbers)
        if node.op == "output":
            lines.append(f"return {_value(node.args[0], numbers)}")
        else:
            numbers[node] = f"%{len(numbers) + 1}"
            lines.append(f"{numbers[node]} = {text}")
    return "\n".join(lines)


def _operation(model: nn.Module, node: fx.Node, numbers: dict[fx.Node, str]) -> str:
    if node.op == "placeholder":
        default = f" = {node.args[0]!r}" if node.args else ""
        stars = "*" * (len(str(node.target)) - len(str(node.target).lstrip("*")))
        return f"{stars}input{default}"
    if node.op == "get_attr":
        return str(node.target)
    arguments = [_value(argument, numbers) for argument in node.args]
    arguments += [f"{name}={_value(value, numbers)}" for name, value in node.kwargs.items()]
    call = f"({', '.join(arguments)})"
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if isinstance(module, Site):
            return _evaluation(module, node, numbers)
        if isinstance(module, BatchedEvaluation):
            return f"evaluate together {', '.join(site.spec.name for site in module.sites)}"
        return f"{node.target}{call}"
    if node.op == "call_method":
        return f".{node.target}{call}"
    return f"{getattr(node.target, '__name__', node.target)}{call}"


def _evaluation(site: Site, node: fx.Node, numbers: dict[fx.Node, str]) -> str:
    start = [*site.original_names, *(_value(argument, numbers) for argument in node.args)]
    policies = [site.spec.cache] if site.spec.cache != "forward" else []
    policies += ["recompute"] if site.spec.memory == "recompute" else []
    policies += ["cast once"] if node.kwargs.get("cast") else []
    policies += ["base and change apart"] if node.kwargs.get("apart") else []
    policies += [f"first {site.hoisted} hoisted"] if site.hoisted else []
    if "batch" not in node.kwargs:  # a batch evaluates its chains as they are written
        policies += [f"steps {start + 1}–{stop} as one" for start, stop in site.fused]
    else:
        policies.append(f"from {_value(node.kwargs['batch'], numbers)}")
    shown = f" [{', '.join(policies)}]" if policies else ""
    names = " & ".join(" = ".join(member.names) for member in site.spec.members)
    return f"evaluate {names}{shown}: {', '.join(start)} >> {' >> '.join(site.spec.chain)}"


def _value(value: Any, numbers: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, tuple):
        return f"({', '.join(_value(item, numbers) for item in value)})"
    if isinstance(value, list):
        return f"[{', '.join(_value(item, numbers) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(item, numbers)}" for key, item in value.items()) + "}"
    return repr(value)
