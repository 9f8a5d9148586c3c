"""Putting a chain into a program: its nodes, the tensors it stores, and the signature that names them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from rewriter._torch import detect_fake_mode, pytree
from rewriter.errors import CaptureError
from rewriter.planning import Plan
from rewriter.program._sites import Computed, ProgramSite, Slot, mark, note, store_records, write_site
from rewriter.serialization._graph_data import graph_to_data
from rewriter.sites import Site
from rewriter.sites._container import path_for

Specs = list[InputSpec]


class Edited:
    """A program on its way: a copy of its graph, its signature and its tensors."""

    def __init__(self, program: ExportedProgram, *, share: bool) -> None:
        self.program = program
        self.module = copy.deepcopy(program.graph_module)
        self.graph = self.module.graph
        # torch.fx renames what is called like a Python builtin, `input` above all; the signature goes by names.
        for node, own in zip(self.graph.nodes, program.graph.nodes, strict=True):
            node.name = own.name
        signature = copy.deepcopy(program.graph_signature)
        self.signature = signature
        self.specs: Specs = list(signature.input_specs)
        held: tuple[dict[str, Any], dict[str, Any]] = (tied(program.state_dict), dict(program.constants))
        # One copy of both, so that tied tensors stay tied.
        self._copies: dict[int, Any] = {}
        self.state, self.constants = held if share else copy.deepcopy(held, self._copies)
        self.fake = detect_fake_mode([node.meta.get("val") for node in self.graph.nodes])

    def copied(self, plan: Plan) -> Plan:
        """Return the plan with sites of its own, over the tensors of this copy."""
        same = (plan.table.model, *plan.spec.rules)
        memo = {**self._copies, **{id(one): one for one in same}}
        table, new = copy.deepcopy((plan.table, plan.new), memo)
        return dataclasses.replace(plan, table=table, new=new)

    def placeholders(self) -> dict[str, fx.Node]:
        """Return the placeholders by name."""
        return {node.name: node for node in self.graph.find_nodes(op="placeholder")}

    def finish(self) -> ExportedProgram:
        """Return the program as edited."""
        self.signature.input_specs = self.specs
        order = [str(spec.target) for spec in self.specs if spec.target in self.state]
        self.state = {name: self.state[name] for name in dict.fromkeys([*order, *self.state])}
        self.graph.lint()
        store_records(self.module)
        self.module.recompile()
        return self.program._update(self.module, self.signature, state_dict=self.state, constants=self.constants)


def tied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return `state` with one object for each memory: reading a file makes several tensors of a tied one."""
    first: dict[Any, Any] = {}
    return {name: first.setdefault(_memory(tensor, name), tensor) for name, tensor in state.items()}


def _memory(tensor: Tensor, name: str) -> Any:
    if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.numel():
        return name
    return (type(tensor), tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


class _Chain(nn.Module):
    """The chain of a site alone, without the caching around it."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def forward(self, *inputs: Tensor) -> Any:
        value = self.site.compose(*inputs)
        return value if isinstance(value, tuple) else (value,)


def insert_site(edited: Edited, site: Site, path: str, values: Mapping[str, fx.Node], training: bool) -> None:
    """Compute the tensors of `site` in the program instead of reading them.

    Arguments:
        edited: the program.
        site: with the values that it starts from.
        path: where its tensors are named, ``fc.parametrizations.weight``.
        values: for each tensor of the program, the node that gives its value.
        training: the mode of the program.
    """
    inputs = [values[name] for name in site.spec.reads]
    examples = tuple(torch.empty_like(_plain(node.meta["val"])) for node in inputs)
    chain = _exported(site, examples, training)
    evaluation = _exported(site, examples, False) if training else chain
    apart = training and str(evaluation.graph) != str(chain.graph)
    members = [_slots(edited, member.names) for member in site.spec.members]
    first = members[0][0].name
    env, stored, originals = _store(edited, site, chain, path, edited.placeholders()[first])
    aliases = _store_aliases(edited, site, path, stored)
    user_inputs = iter(inputs)
    for node in chain.graph.find_nodes(op="placeholder"):
        if node.name not in env:
            env[node.name] = next(user_inputs)
    results = _copy_nodes(edited, chain, env, site.spec.name, _last_placeholder(edited.graph))
    computed = []
    for member, slots, value in zip(site.spec.members, members, results, strict=True):
        shape = list(member.shape)
        computed.append(
            Computed(value.name, member.kind, member.persistent, member.requires_grad, shape, member.dtype, slots)
        )
        _replace(edited, slots, value)
    record = ProgramSite(
        site.spec.rule,
        list(site.spec.chain),
        site.spec.options,
        computed,
        originals,
        stored,
        [node.name for node in inputs],
        site.spec.trainable is not None or any(getattr(step, "freezes_original", False) for step in site.steps),
        aliases,
        graph_to_data(_as_functions(evaluation)) if apart else None,
        list(site.spec.labels),
    )
    write_site(results[0], record)


def _exported(site: Site, examples: tuple[Tensor, ...], training: bool) -> ExportedProgram:
    clone = copy.deepcopy(site).train(training)
    try:
        program = torch.export.export(_Chain(clone), examples)
    except Exception as problem:
        text = str(problem).strip().partition("\n")[0]
        raise CaptureError(
            f"{site.spec.name}: torch.export cannot capture {' >> '.join(site.spec.chain)}: {text}"
        ) from problem
    return program


def _plain(value: Any) -> Tensor:
    return torch.empty(tuple(int(size) for size in value.shape), dtype=value.dtype, device=value.device)


def _slots(edited: Edited, names: tuple[str, ...]) -> list[Slot]:
    order = [spec.arg.name for spec in edited.specs]
    placeholders = edited.placeholders()
    by_target = {spec.target: spec.arg.name for spec in edited.specs if spec.target is not None}
    slots = []
    for name in names:
        placeholder = by_target[name]
        index = order.index(placeholder)
        before = order[index + 1] if index + 1 < len(order) else ""
        slots.append(Slot(placeholder, name, before, [user.name for user in placeholders[placeholder].users]))
    return slots


def _store(
    edited: Edited, site: Site, chain: ExportedProgram, path: str, place: fx.Node
) -> tuple[dict[str, fx.Node], list[str], list[str]]:
    """Make placeholders for the stored tensors ahead of the one that they replace."""
    env: dict[str, fx.Node] = {}
    names: dict[str, str] = {}
    index = next(i for i, spec in enumerate(edited.specs) if spec.arg.name == place.name)
    tensors: dict[str, Any] = {**dict(site.named_parameters()), **dict(site.named_buffers())}
    for spec in chain.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        own = str(spec.target).removeprefix("site.")
        target = f"{path}.{own}"
        tensor = tensors[own] if own in tensors else chain.constants[str(spec.target)]
        letter = {InputKind.PARAMETER: "p", InputKind.BUFFER: "b"}.get(spec.kind, "c")
        with edited.graph.inserting_before(place):
            node = edited.graph.placeholder(f"{letter}_{target.replace('.', '_')}")
        node.meta["val"] = _fake(edited, tensor)
        persistent = spec.persistent
        edited.specs.insert(index, InputSpec(spec.kind, TensorArgument(node.name), target, persistent))
        index += 1
        if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and persistent):
            edited.state[target] = tensor
        else:
            edited.constants[target] = tensor
        env[spec.arg.name] = node
        names[own] = node.name
    return env, list(names.values()), [names[name] for name in site.original_names if name in names]


def _store_aliases(edited: Edited, site: Site, path: str, stored: list[str]) -> list[str]:
    """Name the stored tensors under the further names of a tied tensor too, as a state dict does."""
    aliases: list[str] = []
    for name in site.spec.members[0].names[1:]:
        other = path_for(name)
        for own in stored:
            index, spec = next((i, spec) for i, spec in enumerate(edited.specs) if spec.arg.name == own)
            target = other + str(spec.target).removeprefix(path)
            place = edited.placeholders()[own]
            with edited.graph.inserting_after(place):
                node = edited.graph.placeholder(f"{own[0]}_{target.replace('.', '_')}")
            node.meta["val"] = place.meta["val"]
            edited.specs.insert(index + 1, InputSpec(spec.kind, TensorArgument(node.name), target, spec.persistent))
            held = edited.state if spec.target in edited.state else edited.constants
            held[target] = held[str(spec.target)]
            aliases.append(node.name)
    return aliases


def _fake(edited: Edited, value: Any) -> Any:
    if not isinstance(value, Tensor) or edited.fake is None:
        return value
    with edited.fake:
        shape = tuple(int(size) for size in value.shape)
        made = torch.empty_strided(shape, tuple(value.stride()), dtype=value.dtype, device=value.device)
    return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made


def _copy_nodes(
    edited: Edited, chain: ExportedProgram, env: dict[str, fx.Node], name: str, place: fx.Node
) -> list[fx.Node]:
    for node in chain.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        with edited.graph.inserting_after(place):
            copied = edited.graph.node_copy(node, lambda read: env[read.name])
        if node.op == "get_attr":
            copied.target = _add_module(edited, getattr(chain.graph_module, str(node.target)))
        for key in ("val", "tensor_meta"):
            if key in copied.meta:
                copied.meta[key] = pytree.tree_map(lambda value: _fake(edited, value), copied.meta[key])
        copied.meta.pop("tensor_meta", None)
        copied.meta.pop("custom", None)
        mark(copied, name)
        env[node.name] = place = copied
    results: Any
    (results,) = chain.graph.output_node().args
    found: list[fx.Node] = []
    for result in results:
        value = env[result.name]
        if value.op == "placeholder" or value in found:
            # A chain that does nothing still has a node of its own, which remembers the site.
            with edited.graph.inserting_after(place):
                former, value = value, edited.graph.call_function(torch.ops.aten.alias.default, (value,))
            value.meta.update({key: former.meta[key] for key in ("val",) if key in former.meta})
            mark(value, name)
            place = value
        found.append(value)
    return found


def _add_module(edited: Edited, module: Any) -> str:
    taken = set(edited.module._modules)
    name = next(name for name in (f"reparam_{i}" for i in range(len(taken) + 1)) if name not in taken)
    for inner in module.modules():
        for node in getattr(getattr(inner, "graph", None), "nodes", ()):
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(lambda value: _fake(edited, value), node.meta["val"])
    edited.module.add_module(name, module)
    return name


def _replace(edited: Edited, slots: list[Slot], value: fx.Node) -> None:
    placeholders = edited.placeholders()
    for slot in slots:
        placeholder = placeholders[slot.name]
        placeholder.replace_all_uses_with(value)
        edited.graph.erase_node(placeholder)
        edited.specs = [spec for spec in edited.specs if spec.arg.name != slot.name]
        edited.state.pop(slot.target, None)
        edited.constants.pop(slot.target, None)


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    """Return the node after which a chain goes: the last placeholder, or the chain before it."""
    last: fx.Node = graph.find_nodes(op="placeholder")[-1]
    for node in graph.nodes:
        if note(node).keys() & {"part", "site"}:
            last = node
    return last


def _as_functions(program: ExportedProgram) -> fx.Graph:
    """Return the graph with positional placeholders and nothing that is no data."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            raise CaptureError(f"a step of the chain is no plain computation in evaluation mode: {node.target}")
        env[node] = graph.node_copy(node, lambda read: env[read])
        env[node].meta = {}
    return graph
