"""A torch.fx graph as plain data, and back, so that a saved graph holds no code."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx

from rewriter.errors import ModelFileError
from rewriter.serialization._functions import (
    function_named,
    is_allowed_attribute,
    is_allowed_method,
    is_registered,
    name_of_function,
)
from rewriter.serialization._graph_signature import signature_from_data, signature_to_data
from rewriter.serialization._graph_values import decode, encode, is_identifier

VERSION = 1

_ANNOTATIONS: dict[str, Any] = {
    "torch.Tensor": torch.Tensor,
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "list": list,
    "tuple": tuple,
    "dict": dict,
}
_SEGMENT = re.compile(r"(?!__)\w+", re.ASCII)
_TAKEN = frozenset({"self", "torch"})
"""Names that the generated code reads: a node with one of them would stand in their place."""


def graph_to_data(graph: fx.Graph) -> dict[str, Any]:
    """Return `graph` as dicts, lists and scalars: nodes in order, arguments, ``meta["reparam"]``.

    >>> import torch
    >>> from torch import fx
    >>> data = graph_to_data(fx.symbolic_trace(torch.nn.ReLU()).graph)
    >>> [node["op"] for node in data["nodes"]]
    ['placeholder', 'call_function', 'output']

    Torch's functions are stored by name. A function of the user's own is stored as a reference, which pickle writes
    as ``package.module.name``. The reader has to allow it with ``--allow``.

    Raises:
        ModelFileError: something in the graph is no data: a lambda, a tensor constant among the arguments, ….
    """
    nodes = [_node_to_data(node) for node in graph.nodes]
    signature = signature_to_data(graph)
    return {"version": VERSION, "nodes": nodes, **({"signature": signature} if signature else {})}


def graph_from_data(data: Mapping[str, Any], owner: torch.nn.Module) -> fx.Graph:
    """Return the graph that `graph_to_data` stored, checked as input from a file.

    No code is generated. Call it when `owner` is complete: the graph is valid for the module tree of this moment.

    >>> import torch
    >>> from torch import fx
    >>> module = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    >>> graph = graph_from_data(graph_to_data(module.graph), module)
    >>> [node.name for node in graph.nodes]
    ['input_1', '_0', 'output']

    Arguments:
        owner: the module whose submodules and tensors the graph names. Names resolve through `_modules`,
            `_parameters` and `_buffers` alone.

    Raises:
        ModelFileError: a name, function, method or attribute that a stored graph may not use.
    """
    if not isinstance(data, Mapping) or data.get("version") != VERSION or not isinstance(data.get("nodes"), list):
        raise ModelFileError("the file's graph is not of a form this version of reparam reads")
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        try:
            node = _node_from_data(entry, graph, nodes, owner)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
            raise ModelFileError(f"the file's graph is damaged at node {len(nodes)}: {problem!r:.300}") from problem
        nodes[node.name] = node
    signature_from_data(data.get("signature"), graph)
    graph.lint()
    return graph


def _node_to_data(node: fx.Node) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "op": node.op,
        "name": node.name,
        "target": _target_to_data(node),
        "args": [encode(value, node) for value in node.args],
        "kwargs": {key: encode(value, node) for key, value in node.kwargs.items()},
    }
    for name, known in _ANNOTATIONS.items():
        if node.type is known:
            entry["type"] = name
        elif node.type == name:  # `from __future__ import annotations` leaves the text
            entry["type"] = {"text": name}
    if "reparam" in node.meta:
        entry["reparam"] = encode(node.meta["reparam"], node)
    return entry


def _target_to_data(node: fx.Node) -> Any:
    if node.op != "call_function":
        return node.target
    function = node.target
    assert callable(function)
    name = name_of_function(function)
    if name is not None:
        return name
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if getattr(sys.modules.get(str(module)), qualname, None) is not function or str(module).startswith("torch"):
        raise ModelFileError(
            f"node {node.name!r} calls {function!r}, which has no name to store; use a module-level function"
        )
    return {"function": function}


def _node_from_data(
    entry: Mapping[str, Any], graph: fx.Graph, nodes: Mapping[str, fx.Node], owner: torch.nn.Module
) -> fx.Node:
    op, name = entry["op"], entry["name"]
    # torch.fx pastes names into the source it compiles: a name that is more than a name would be code.
    if not is_identifier(name) or name in nodes or name in _TAKEN:
        raise ModelFileError(f"the file's graph has a node called {name!r}, which is no name or not unique")
    args = tuple(decode(value, nodes) for value in entry["args"])
    kwargs = {key: decode(value, nodes) for key, value in entry["kwargs"].items()}
    if not all(is_identifier(key) for key in kwargs):
        raise ModelFileError(f"node {name!r} has a keyword that is no name: {sorted(map(str, kwargs))}")
    target = _target_from_data(op, entry["target"], owner)
    if target is getattr:
        _check_attribute(name, args, kwargs)
    if op != "output" and not is_registered(target):
        _refuse_modules(name, [*args, *kwargs.values()], owner)
    annotation = _annotation(entry["type"]) if "type" in entry else None
    node = graph.create_node(op, target, args, kwargs, name, annotation)
    # torch.fx numbers some names again (an export's `input` shadows a builtin). Generated code is unaffected.
    node.name = name
    if "reparam" in entry:
        node.meta["reparam"] = decode(entry["reparam"], {})
    return node


def _annotation(data: Any) -> Any:
    if isinstance(data, dict):
        return data["text"] if _ANNOTATIONS[data["text"]] else None
    return _ANNOTATIONS[data]


def _target_from_data(op: str, target: Any, owner: torch.nn.Module) -> Callable[..., Any] | str:
    if op == "call_function":
        return _user_function(target["function"]) if isinstance(target, dict) else function_named(target)
    if not isinstance(target, str):
        raise ModelFileError(f"the file's graph has a {op} node whose target is no name: {target!r:.100}")
    if op == "placeholder" and len(target) - len(name := target.lstrip("*")) < 3 and is_identifier(name):
        allowed = name not in _TAKEN
    elif op == "output":
        allowed = target == "output"
    elif op == "call_method":
        allowed = is_allowed_method(target)
    else:
        found = _resolved(target, owner) if op in ("get_attr", "call_module") else None
        allowed = isinstance(found, torch.nn.Module) or (op == "get_attr" and found is not None)
    if not allowed:
        raise ModelFileError(f"the file's graph has a {op} node with the target {target!r}, not allowed there")
    return target


def _user_function(function: Any) -> Callable[..., Any]:
    # Torch's functions and this package's own are stored by name.
    home = str(getattr(function, "__module__", None) or "").partition(".")[0]
    if not isinstance(function, (FunctionType, BuiltinFunctionType)) or home in ("builtins", "rewriter", "torch"):
        raise ModelFileError(f"the file's graph calls {function!r}, which is no function of the user's own")
    return function


def _resolved(target: str, owner: torch.nn.Module) -> Any:
    """Return what generated code reads as ``self.<target>``, ``None`` if Python would find something else first."""
    found: Any = owner
    for segment in target.split("."):
        if not isinstance(found, torch.nn.Module) or not _SEGMENT.fullmatch(segment):
            return None
        if segment == "training":  # what train() and eval() set is read when the graph runs
            found = found.training if isinstance(found.training, bool) else None
        elif segment in vars(found) or callable(getattr(type(found), segment, None)):
            return None
        else:
            tables = (found._parameters, found._buffers, found._modules)
            present = (table[segment] for table in tables if table.get(segment) is not None)
            found = next(present, _computed(segment, found))
    return found


def _computed(name: str, owner: torch.nn.Module) -> torch.Tensor | None:
    """Return a stand-in for a computed tensor: a property of an owner of parametrizations."""
    owns = isinstance(owner._modules.get("parametrizations"), torch.nn.Module)
    read = inspect.getattr_static(type(owner), name, None)
    return torch.empty(0) if owns and isinstance(read, (property, type(None))) else None


def _refuse_modules(name: str, arguments: list[Any], owner: torch.nn.Module) -> None:
    # A module is a callable: only this package's own functions take one.
    def check(node: fx.Node) -> None:
        if node.op == "get_attr" and isinstance(_resolved(str(node.target), owner), torch.nn.Module):
            raise ModelFileError(f"node {name!r} is given the module {str(node.target)!r}, which a model file may not")

    fx.node.map_arg(arguments, check)


def _check_attribute(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    attribute = args[1] if len(args) in (2, 3) and not kwargs else None
    if not isinstance(attribute, str) or not is_allowed_attribute(attribute):
        raise ModelFileError(f"node {name!r} reads the attribute {attribute!r}, which a model file may not")
