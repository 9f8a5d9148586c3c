"""Sizes that may vary: named in text, and varied to check a file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from rewriter._torch import pytree
from rewriter.capture import Call
from rewriter.errors import RewriterError

_ENTRY = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(?:([A-Za-z_]\w*)\.)?(\d+)\s*(?::\s*(\d+)\s*\.\.\s*(\d+)\s*)?")


def dynamic_shapes_of(model: nn.Module, text: str, call: Call) -> dict[str, Any]:
    """Return the `dynamic_shapes` of torch.export that `text` means for a call of `model`.

    ``batch=0`` lets dimension 0 of every tensor vary, by one size. ``time=tokens.1`` is dimension 1 of the argument
    `tokens` alone, and ``time=1:2..512`` has limits. Commas separate entries, and a name may have several of them.

    >>> dynamic_shapes_of(nn.Linear(3, 2), "batch=0", Call((torch.ones(5, 3),)))
    {'input': {0: Dim('batch', min=0)}}

    Raises:
        RewriterError: an entry is of another form, or does not fit the example inputs.
    """
    arguments = _bound(model, call)
    shapes: dict[str, Any] = {
        name: pytree.tree_map(lambda value: {} if isinstance(value, Tensor) else None, value)
        for name, value in arguments.items()
    }
    dims: dict[str, Any] = {}
    sizes: dict[str, tuple[str, int]] = {}
    for entry in text.split(","):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise RewriterError(
                f"a size that varies is given as NAME=[INPUT.]DIM[:LOW..HIGH], such as batch=0, not {entry!r}"
            )
        name, only, dim = match[1], match[2], int(match[3])
        limits = {"min": int(match[4]), "max": int(match[5])} if match[4] else {}
        if only is not None and only not in arguments:
            raise RewriterError(
                f"{entry.strip()}: the model has no input {only!r}; its inputs are {', '.join(arguments)}"
            )
        found = False
        for argument, value in arguments.items():
            if only not in (None, argument):
                continue
            leaves = pytree.tree_leaves(value)
            specs = pytree.tree_leaves(shapes[argument], is_leaf=lambda one: one is None or _is_dims(one))
            for leaf, spec in zip(leaves, specs, strict=True):
                if not isinstance(leaf, Tensor) or leaf.dim() <= dim:
                    continue
                found = True
                _check_size(name, f"{argument}.{dim}", leaf.shape[dim], sizes)
                if dim in spec:
                    raise RewriterError(f"dimension {dim} of {argument} has two names: {spec[dim].__name__} and {name}")
                spec[dim] = dims.setdefault(name, torch.export.Dim(name, **limits))
        if not found:
            raise RewriterError(f"{entry.strip()}: no example input has a dimension {dim}")
    return shapes


def _is_dims(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, int) for key in value)


def _check_size(name: str, where: str, size: int, sizes: dict[str, tuple[str, int]]) -> None:
    if size < 2:
        raise RewriterError(
            f"{name}: {where} has the size {size} in the example inputs, which torch.export takes as fixed; "
            "give an example with a size of 2 or more"
        )
    first, known = sizes.setdefault(name, (where, size))
    if size != known:
        raise RewriterError(
            f"{name} is {known} in {first} and {size} in {where}, and is one size; name an input: {name}={first}"
        )


def _bound(model: nn.Module, call: Call) -> dict[str, Any]:
    try:
        return dict(inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments)
    except TypeError as problem:
        raise RewriterError(f"the example inputs do not fit the model: {problem}") from problem


def in_order(model: nn.Module, call: Call) -> Call:
    """Return the call with its keyword arguments in the order of the forward's signature, as a program has them."""
    order = {name: index for index, name in enumerate(inspect.signature(model.forward).parameters)}
    names = sorted(call.kwargs, key=lambda name: order.get(name, len(order)))
    return Call(call.args, {name: call.kwargs[name] for name in names}, call.dynamic_shapes)


def at_another_size(program: ExportedProgram, call: Call) -> Call | None:
    """Return the call with each varying size one larger, or one smaller at its limit; ``None`` if no size varies."""
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    inputs = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    leaves, structure = pytree.tree_flatten((tuple(call.args), dict(call.kwargs)))
    shapes = [getattr(nodes[name].meta.get("val"), "shape", ()) if name in nodes else () for name in inputs]
    if len(shapes) != len(leaves):
        return None
    expressions = [
        (index, dim, size.node.expr)
        for index, shape in enumerate(shapes)
        for dim, size in enumerate(shape)
        if isinstance(size, torch.SymInt)
    ]
    new = {
        expression: _varied(leaves[index].shape[dim], program.range_constraints.get(expression))
        for index, dim, expression in expressions
        if expression.is_Symbol
    }
    if not expressions or any(expression.free_symbols - new.keys() for _, _, expression in expressions):
        return None
    for index, dim, expression in expressions:
        size = int(expression.subs(new))
        old = leaves[index].shape[dim]
        leaves[index] = leaves[index].index_select(dim, torch.arange(size, device=leaves[index].device) % max(old, 1))
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    return Call(args, kwargs)


def _varied(size: int, limits: Any) -> int:
    return size + 1 if limits is None or size + 1 <= limits.upper else size - 1


def checked_shapes(model: nn.Module | ExportedProgram, shapes: str | Mapping[str, Any] | Any, call: Call) -> Any:
    """Return `dynamic_shapes` as torch.export takes them.

    Raises:
        RewriterError: the text does not fit, or the model is a program.
    """
    if isinstance(model, ExportedProgram):
        raise RewriterError("an ExportedProgram has its sizes already: export the module with dynamic shapes")
    return dynamic_shapes_of(model, shapes, call) if isinstance(shapes, str) else shapes
