"""How a graph takes nested arguments and returns nested results, as plain data, and back."""

from __future__ import annotations

import contextlib
import functools
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen

from rewriter._torch import PyTreeCodeGen, PyTreeInfo, pytree
from rewriter.errors import ModelFileError
from rewriter.serialization._graph_values import is_identifier

_CONTAINERS: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict}
_LEAF = "leaf"


def signature_to_data(graph: fx.Graph) -> dict[str, Any] | None:
    """Return the names and nesting of a graph's inputs and outputs, ``None`` if its placeholders are its inputs.

    Raises:
        ModelFileError: the graph generates its code in another way, or nests its arguments in unusual containers.
    """
    codegen = graph._codegen
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not PyTreeCodeGen:
        raise ModelFileError(f"a graph with code generation of its own ({type(codegen).__name__}) cannot be stored")
    info = codegen.pytree_info
    outputs = None if info.out_spec is None else _tree_to_data(_example(info.out_spec))
    return {"names": list(info.orig_args), "inputs": _tree_to_data(_example(info.in_spec)), "outputs": outputs}


def signature_from_data(data: Any, graph: fx.Graph) -> None:
    """Give `graph` the signature that `signature_to_data` stored.

    Raises:
        ModelFileError: a name that is none, or a container that is no tuple, list or dict.
    """
    if data is None:
        return
    names = data.get("names") if isinstance(data, Mapping) else None
    if not isinstance(names, list) or not all(map(is_identifier, names)):
        raise ModelFileError("the file's graph has a signature that is damaged")
    try:
        inputs, outputs = _spec_from_data(data.get("inputs")), None
        if data.get("outputs") is not None:
            outputs = _spec_from_data(data["outputs"])
    except RecursionError:
        raise ModelFileError("the file's graph nests its arguments too deeply") from None
    graph.set_codegen(PyTreeCodeGen(PyTreeInfo(names, inputs, outputs)))


@functools.lru_cache(maxsize=256)
def structure_from_text(text: str) -> pytree.TreeSpec:
    """Return the structure that torch's `treespec_dumps` wrote, once it is clear that torch imports nothing for it.

    Raises:
        ModelFileError: it names a module to import: a default dict's factory, or an enumeration.
    """
    pending: list[Any] = [json.loads(text)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if value.get("type") == "collections.defaultdict" or "__enum__" in value:
                raise ModelFileError("the file's graph returns a structure that names a module to import")
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):  # torch parses a context once more
            with contextlib.suppress(ValueError):
                pending.append(json.loads(value))
    return pytree.treespec_loads(text)


def _example(spec: pytree.TreeSpec) -> Any:
    return spec.unflatten([_LEAF] * spec.num_leaves)


def _tree_to_data(tree: Any) -> Any:
    if tree == _LEAF or tree is None:
        return tree
    name = type(tree).__name__
    known = _CONTAINERS.get(name) is type(tree)
    if known and name in ("tuple", "list"):
        return {name: [_tree_to_data(item) for item in tree]}
    if known and all(type(key) in (str, int) for key in tree):
        return {name: [[key, _tree_to_data(item)] for key, item in tree.items()]}
    raise ModelFileError(f"a graph that nests its arguments in a {name} cannot be stored")


def _spec_from_data(data: Any) -> pytree.TreeSpec:
    _, spec = pytree.tree_flatten(_tree_from_data(data))
    return spec


def _tree_from_data(data: Any) -> Any:
    if data == _LEAF or data is None:
        return data
    if not isinstance(data, dict) or len(data) != 1:
        raise ModelFileError("the file's graph has a signature that is damaged")
    ((name, items),) = data.items()
    kind = _CONTAINERS.get(name)
    try:
        if kind in (tuple, list):
            return kind(_tree_from_data(item) for item in items)
        if kind is not None and all(type(key) in (str, int) for key, _ in items):
            return kind((key, _tree_from_data(item)) for key, item in items)
    except (TypeError, ValueError) as problem:
        raise ModelFileError("the file's graph has a signature that is damaged") from problem
    raise ModelFileError(f"the file's graph nests its arguments in a {name!r}, which no file may")
