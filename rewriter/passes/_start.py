"""How a graph begins, up to the first thing that may change what its kept values depend on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from rewriter.passes._infra import Rewriting
from rewriter.passes._pure import module_writes_nothing, writes_nothing
from rewriter.runtime import CONTAINER, ParametrizedTensor, RewrittenModule, Session
from rewriter.runtime._batch import BatchedEvaluation
from rewriter.runtime._standing import Start

_WRITTEN = "_reparam_given"


def start_of_graph(model: RewrittenModule) -> Start:
    """Return how the graph of a model begins, with its modules as they are now."""
    reading = Rewriting(model, model.graph, {}, {}, Session())
    given, called = _start(reading)
    sites = [node for node in given if node.op == "call_module"]
    tensors = [node for node in given if node.op == "get_attr"]
    code = functools.partial(_forward_given, model, [*sites, *tensors])
    return Start([str(node.target) for node in sites], [str(node.target) for node in tensors], called, code)


def keeps_values(model: RewrittenModule) -> bool:
    """Whether the graph of a model reads values that are kept from one forward to the next."""
    return any(_is_kept_value(model, node) for node in model.graph.nodes)


def _start(reading: Rewriting) -> tuple[list[fx.Node], list[str]]:
    """Return the nodes whose values can be told before the graph runs, and the modules that are called up to there."""
    graph = reading.graph
    given: list[fx.Node] = []
    called: list[str] = []
    passed: list[str] = []
    plain = type(graph._codegen) is fx.graph.CodeGen and graph._codegen._body_transformer is None
    for node in graph.nodes if plain else ():
        if _is_kept_value(reading.root, node) or _is_own_tensor(reading, node):
            given.append(node)
            called += passed
            passed = []
        elif not _changes_nothing(reading, node):
            break
        elif node.op == "call_module":
            passed.append(str(node.target))
    return given, called


def _is_kept_value(model: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module" or node.args or node.kwargs.keys() - {"cast"} or CONTAINER not in str(node.target):
        return False
    site: nn.Module | None = model
    for name in str(node.target).split("."):  # somebody may have put another module there
        site = None if site is None else site._modules.get(name)
    return isinstance(site, ParametrizedTensor) and site.holding.versioned


def _is_own_tensor(reading: Rewriting, node: fx.Node) -> bool:
    """Whether a node reads a parameter or buffer from the module that has it."""
    if node.op != "get_attr":
        return False
    path, _, name = str(node.target).rpartition(".")
    owner = reading.module(path)
    return owner._parameters.get(name) is not None or owner._buffers.get(name) is not None


def _changes_nothing(reading: Rewriting, node: fx.Node) -> bool:
    if node.op == "placeholder":
        return True
    if node.op != "call_module":
        return writes_nothing(reading, node)
    module = reading.module(node.target)
    # What evaluates a site may advance the state of another.
    return not isinstance(module, (ParametrizedTensor, BatchedEvaluation)) and module_writes_nothing(module)


def _forward_given(model: RewrittenModule, given: Sequence[fx.Node]) -> Callable[..., Any]:
    """Return the code of a graph that is given the values of some of its nodes ahead of its arguments."""
    kind: Any = type(model)
    # Equal models have one class, in whose code the nodes have their names.
    written: dict[tuple[str, ...], Callable[..., Any]] = kind.__dict__.get(_WRITTEN) or {}
    names = tuple(node.name for node in given)
    if names not in written:
        written = {**written, names: _written(model.graph, given)}
        setattr(kind, _WRITTEN, written)
    return written[names]


def _written(graph: fx.Graph, given: Sequence[fx.Node]) -> Callable[..., Any]:
    started = fx.Graph()
    given_as = "given"
    while any(given_as in str(node.target) for node in graph.nodes if node.op == "placeholder"):
        given_as += "_"
    copies = {node: started.placeholder(f"{given_as}_{index}") for index, node in enumerate(given)}
    for node in graph.nodes:
        if node not in copies:
            copies[node] = started.node_copy(node, copies.__getitem__)
    module: Any = fx.GraphModule(nn.Module(), fx.Graph())
    module.graph = started
    return type(module).forward  # type: ignore[no-any-return]
