"""A torch.fx graph as plain data, and back, so that a saved graph holds no code."""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx

from rewriter.errors import ModelFileError
from rewriter.serialization._functions import function_named, is_allowed_attribute, is_allowed_method, name_of_function
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
_PATH = re.compile(r"[A-Za-z_0-9][A-Za-z_0-9]*(\.[A-Za-z_0-9]+)*", re.ASCII)
_PLACEHOLDER = re.compile(r"\*{0,2}[A-Za-z_]\w*", re.ASCII)


def graph_to_data(graph: fx.Graph) -> dict[str, Any]:
    """Return `graph` as dicts, lists and scalars: nodes in order, arguments, ``meta["reparam"]``.

    >>> import torch
    >>> from torch import fx
    >>> data = graph_to_data(fx.symbolic_trace(torch.nn.ReLU()).graph)
    >>> [node["op"] for node in data["nodes"]]
    ['placeholder', 'call_function', 'output']

    Torch's functions are stored by name. A function of the user's own is kept as a reference, which pickle
    stores as ``package.module.name``; reading it back is then up to the reader's ``--allow``.

    Raises:
        ModelFileError: something in the graph is no data: a lambda, a tensor constant among the arguments, ….
    """
    nodes = [_node_to_data(node) for node in graph.nodes]
    signature = signature_to_data(graph)
    return {"version": VERSION, "nodes": nodes, **({"signature": signature} if signature else {})}


def graph_from_data(data: Mapping[str, Any], owner: torch.nn.Module) -> fx.Graph:
    """Return the graph that `graph_to_data` stored, checked as what it is: input from a file.

    >>> import torch
    >>> from torch import fx
    >>> module = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    >>> graph = graph_from_data(graph_to_data(module.graph), module)
    >>> [node.name for node in graph.nodes]
    ['input_1', '_0', 'output']

    Arguments:
        owner: the module whose submodules and tensors the graph names; each of them must exist there.

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
            raise ModelFileError(f"the file's graph is damaged at node {len(nodes)}: {problem!r}") from problem
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
    if not is_identifier(name) or name in nodes:
        raise ModelFileError(f"the file's graph has a node called {name!r}, which is no name or not unique")
    args = tuple(decode(value, nodes) for value in entry["args"])
    kwargs = {key: decode(value, nodes) for key, value in entry["kwargs"].items()}
    if not all(is_identifier(key) for key in kwargs):
        raise ModelFileError(f"node {name!r} has a keyword that is no name: {sorted(map(str, kwargs))}")
    target = _target_from_data(op, entry["target"], owner)
    if target is getattr:
        _check_attribute(name, args, kwargs)
    annotation = _annotation(entry["type"]) if "type" in entry else None
    node = graph.create_node(op, target, args, kwargs, name, annotation)
    # torch.fx numbers some names anew (an export's `input` shadows a builtin); generated code is unaffected.
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
        if isinstance(target, dict):
            function = target["function"]
            if not isinstance(function, (FunctionType, BuiltinFunctionType)):
                raise ModelFileError(f"the file's graph calls {function!r}, which is no function")
            return function
        return function_named(target)
    if not isinstance(target, str):
        raise ModelFileError(f"the file's graph has a {op} node whose target is no name: {target!r}")
    if op == "placeholder" and _PLACEHOLDER.fullmatch(target) and not keyword.iskeyword(target.lstrip("*")):
        return target
    if op == "output" and target == "output":
        return target
    if op == "call_method" and is_allowed_method(target):
        return target
    if op in ("get_attr", "call_module") and _exists(op, target, owner):
        return target
    raise ModelFileError(f"the file's graph has a {op} node with the target {target!r}, not allowed there")


def _exists(op: str, target: str, owner: torch.nn.Module) -> bool:
    if not _PATH.fullmatch(target):
        return False
    path, _, last = target.rpartition(".")
    try:
        module = owner.get_submodule(path)
    except AttributeError:
        return False
    if op == "call_module":
        return isinstance(module._modules.get(last), torch.nn.Module)
    if last == "training":  # what train() and eval() set is read when the graph runs
        return isinstance(module.training, bool)
    return isinstance(getattr(module, last, None), (torch.Tensor, torch.nn.Module))


def _check_attribute(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    attribute = args[1] if len(args) in (2, 3) and not kwargs else None
    if not isinstance(attribute, str) or not is_allowed_attribute(attribute):
        raise ModelFileError(f"node {name!r} reads the attribute {attribute!r}, which a model file may not")
