"""Arguments of graph nodes as plain data, and back."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import fx

from rewriter.errors import ModelFileError

_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def encode(value: Any, node: fx.Node) -> Any:
    """Return an argument of `node` as scalars, lists and one-entry dicts that say what they stand for."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode(item, node) for item in value]}
    if isinstance(value, list):
        return {"list": [encode(item, node) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, node), encode(item, node)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(item, node) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, EllipsisType):
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, cls in _NAMED.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise ModelFileError(f"node {node.name!r} has an argument that is no plain data: {type(value).__name__} {value!r}")


def decode(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """Return the argument that `encode` stored. `nodes` are the nodes before it."""
    if data is None or type(data) in (bool, int, float, str):
        return data
    if not isinstance(data, dict) or len(data) != 1:
        raise ModelFileError(f"the file's graph holds a value that is no plain data: {type(data).__name__}")
    ((kind, content),) = data.items()
    if kind == "node":
        return nodes[content]
    if kind == "size":
        return torch.Size(content)
    if kind == "tuple":
        return tuple(decode(item, nodes) for item in content)
    if kind == "list":
        return [decode(item, nodes) for item in content]
    if kind == "dict":
        return {decode(key, nodes): decode(item, nodes) for key, item in content}
    if kind == "slice":
        return slice(*(decode(item, nodes) for item in content))
    if kind == "range":
        return range(*content)
    if kind == "complex":
        return complex(*content)
    if kind == "ellipsis":
        return ...
    if kind == "device":
        return torch.device(content)
    if kind in _NAMED and is_identifier(content):
        found = getattr(torch, content, None)
        if isinstance(found, _NAMED[kind]):
            return found
    raise ModelFileError(f"the file's graph holds a value of an unknown kind {kind!r}")


def is_identifier(name: Any) -> bool:
    """Return whether `name` may stand in generated code as a name."""
    return isinstance(name, str) and name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
