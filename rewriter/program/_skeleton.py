"""A module tree that holds a program's tensors under their names, for selectors to look at."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from rewriter.program._sites import ProgramSite


def skeleton(program: ExportedProgram, values: dict[str, Tensor], training: bool) -> nn.Module:
    """Return modules that own the program's parameters and buffers, in its order.

    Arguments:
        values: the tensors, by their names.
        training: the mode that the program was captured in.
    """
    classes = _classes(program)
    root = _module(classes.get("", ""))
    for spec in program.graph_signature.input_specs:
        if spec.target not in values or spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            continue
        put(root, str(spec.target), values[str(spec.target)], spec.kind, spec.persistent is not False, classes)
    root.train(training)
    return root


def put(root: nn.Module, name: str, value: Tensor, kind: InputKind, persistent: bool, classes: dict[str, str]) -> None:
    """Put one tensor at its place, and make the modules above it."""
    *path, last = name.split(".")
    module = root
    for index, part in enumerate(path):
        if part not in module._modules:
            module.add_module(part, _module(classes.get(".".join(path[: index + 1]), "")))
        module = module._modules[part]  # type: ignore[assignment]
    if kind is InputKind.PARAMETER:
        module._parameters[last] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
    else:
        module.register_buffer(last, value, persistent=persistent)


def with_computed(root: nn.Module, sites: list[ProgramSite], values: dict[str, Tensor]) -> None:
    """Put the values that the program computes at the names that they stand for."""
    for site in sites:
        for member in site.members:
            value = values[member.value]
            shown = nn.Parameter(value, member.requires_grad) if member.kind == "parameter" else value
            kind = InputKind.PARAMETER if member.kind == "parameter" else InputKind.BUFFER
            for slot in member.slots:
                put(root, slot.target, shown, kind, member.persistent, {})


def put_in_order(root: nn.Module, names: Sequence[str]) -> None:
    """Put the tensors of every module into the order of `names`."""
    rank = {name: index for index, name in enumerate(names)}
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            ordered = sorted(tensors.items(), key=lambda item: rank.get(f"{prefix}{item[0]}", len(rank)))
            tensors.clear()
            tensors.update(ordered)


def is_training(program: ExportedProgram) -> bool:
    """Whether an operation of the program runs in train mode, such as a dropout or a batch norm."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            schema = getattr(node.target, "_schema", None)
            for index, argument in enumerate(schema.arguments if schema is not None else ()):
                if argument.name in ("train", "training", "use_input_stats"):
                    value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
                    if value is True:
                        return True
    return False


def _classes(program: ExportedProgram) -> dict[str, str]:
    classes: dict[str, str] = {}
    for node in program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            classes.setdefault(path.split("@")[0], name)
    return classes


def _module(name: str) -> nn.Module:
    module, _, kind = name.rpartition(".")
    if not kind:
        return nn.Module()
    known = getattr(sys.modules.get(module), kind, None) if module.startswith("torch.nn.") else None
    if isinstance(known, type) and issubclass(known, nn.Module):
        body: dict[str, Any] = {"_reparam_plain": known}
    else:
        body = {"__module__": module, "__qualname__": kind}
    made: nn.Module = type(kind, (nn.Module,), body)()
    return made
