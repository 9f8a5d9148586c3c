"""Chains in a program's graph: those that rewriter put there, and those that torch.export captured with a model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, InputSpec

from rewriter.planning._survey import dtype_name
from rewriter.program._sites import Computed, ProgramSite, Slot, mark, note, site_at, stored_records, write_site
from rewriter.program._written import is_written, signature_of
from rewriter.sites._container import path_for
from rewriter.sites._places import CONTAINER

_IN_STRICT_MODE = re.compile(r"(?:^|\.)__dict__\['_modules'\]\['([^']*)'\]")


def sites_of_program(program: Any) -> list[ProgramSite]:
    """Return the sites of a program, in the order in which they are computed.

    torch.export notes the modules of each node. The nodes of a site, and of torch's ParametrizationList, are therefore
    known. Decompositions keep these notes, and replace the nodes that a record names. A record that is found or
    renewed is written into the metadata of the program's nodes.

    Arguments:
        program: an ExportedProgram, or one that is being edited.
    """
    found, lost = _records(program)
    for chain in _chains(program, found):
        reason = chain.problem() or _not_renewable(lost.get(chain.name))
        if not reason:
            site = chain.renewed(lost[chain.name]) if chain.name in lost else chain.site()
            for node in chain.nodes:
                mark(node, site.name)
                if node.name == site.members[0].value:
                    write_site(node, site)
            found[site.name] = site
    order = {node.name: index for index, node in enumerate(program.graph.nodes)}
    return sorted(found.values(), key=lambda site: order[site.members[0].value])


def unknown_chains(program: Any, sites: list[ProgramSite]) -> dict[str, str]:
    """Return the tensors whose chains cannot be taken out of the program, with the reasons."""
    known = {name for site in sites for name in (*site.stored, *site.aliases)}
    names = dict.fromkeys(
        name
        for spec in signature_of(program).input_specs
        if spec.arg.name not in known and (name := _computed_from(str(spec.target))) is not None
    )
    reasons = {chain.name: chain.problem() for chain in _chains(program, {site.name: site for site in sites})}
    return {name: reasons.get(name) or "no node of the graph is noted as part of its chain" for name in names}


@dataclass
class _Chain:
    """The nodes of one chain."""

    program: Any
    name: str
    nodes: list[fx.Node] = field(default_factory=list)

    def values(self) -> list[fx.Node]:
        """Return the nodes that are read outside."""
        inside = set(self.nodes)
        return [node for node in self.nodes if any(user not in inside for user in node.users)]

    def reads(self) -> list[fx.Node]:
        """Return the nodes outside that it reads."""
        inside = set(self.nodes)
        return list(dict.fromkeys(read for node in self.nodes for read in node.all_input_nodes if read not in inside))

    def own(self) -> list[str]:
        """Return the placeholders of the tensors that are stored for it."""
        prefix = f"{path_for(self.name)}."
        return [spec.arg.name for spec in self.specs().values() if str(spec.target).startswith(prefix)]

    def specs(self) -> dict[str, InputSpec]:
        """Return the specs of the program's tensors."""
        return {spec.arg.name: spec for spec in signature_of(self.program).input_specs if spec.target is not None}

    def problem(self) -> str:
        """Return why the chain cannot be taken out of the graph, or an empty text."""
        specs, own, inside = self.specs(), self.own(), set(self.nodes)
        for read in self.reads():
            if read.op == "placeholder" and read.name not in specs:
                return f"it depends on the input {read.name}"
            if read.op == "placeholder" and is_written(self.program, str(specs[read.name].target), read):
                return f"the program, exported in train mode, writes to {specs[read.name].target}"
            if read.op != "placeholder" and "site" not in note(read):
                return f"it reads {read.name}, which is no tensor of the model"
            if read.name in own and not inside.issuperset(read.users):
                return f"{specs[read.name].target} has other uses"
        for node in self.nodes:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                return f"{node.name} draws random numbers"
        values, shapes = self.values(), [tuple(shape) for shape in self.noted()["members"].values()]
        if len(values) != len(shapes):
            return f"the program computes {len(values)} values for it"
        if len(shapes) > 1 and sorted(shapes) != sorted({_shape(value) for value in values}):
            return "its rule computes several tensors of one shape, which the program does not tell apart"
        return ""

    def noted(self) -> dict[str, Any]:
        """Return the rule and the tensors: as the export of a site noted them, or as the modules of the nodes say."""
        for node in self.nodes:
            if "exported" in note(node):
                return dict(note(node)["exported"])
        rule = {"rule": f"exported:{self.name}", "chain": self.steps(), "options": "", "labels": []}
        return {**rule, "members": {self.name: ()}}

    def members(self) -> list[tuple[str, fx.Node]]:
        """Return each tensor that it computes, with the node of its value."""
        values, noted = self.values(), self.noted()["members"]
        if len(noted) == 1:
            return [(self.name, values[0])]
        by_shape = {_shape(value): value for value in values}
        return [(name, by_shape[tuple(shape)]) for name, shape in noted.items()]

    def site(self) -> ProgramSite:
        """Return a record of the chain."""
        specs, own, noted = self.specs(), self.own(), self.noted()
        constants = [
            read.name
            for read in self.reads()
            if getattr(specs.get(read.name), "kind", None) is InputKind.CONSTANT_TENSOR
            and set(self.nodes).issuperset(read.users)
        ]
        stored = [*own, *(name for name in constants if name not in own)]
        originals = [name for name in own if _computed_from(str(specs[name].target)) == self.name]
        trained = [name for name in originals if specs[name].kind is InputKind.PARAMETER]
        kind = "parameter" if trained or not originals else "buffer"
        before = (originals or stored or [""])[0]
        persistent = all(specs[name].persistent is not False for name in originals)
        grad = any(_state(self.program)[str(specs[name].target)].requires_grad for name in trained)
        members = []
        for name, value in self.members():
            slot = Slot(f"{kind[0]}_{name.replace('.', '_')}", name, before, [user.name for user in value.users])
            dtype = dtype_name(value.meta["val"].dtype)
            members.append(Computed(value.name, kind, persistent, grad, list(_shape(value)), dtype, [slot]))
        inputs = [read.name for read in self.reads() if read.name not in stored]
        return ProgramSite(
            noted["rule"],
            noted["chain"],
            noted["options"],
            members,
            originals,
            stored,
            inputs,
            False,
            labels=noted["labels"],
        )

    def renewed(self, lost: ProgramSite) -> ProgramSite:
        """Return `lost` with the nodes that are there now."""
        (value,) = self.values()
        lost.members[0].value = value.name
        for slot in lost.members[0].slots:
            slot.used = [user.name for user in value.users]
        lost.inputs = [read.name for read in self.reads() if read.name not in lost.stored]
        return lost

    def steps(self) -> list[str]:
        """Return the classes of the steps."""
        prefix = f"{path_for(self.name)}."
        classes: dict[str, str] = {}
        for node in self.nodes:
            for path, kind in _stack(node):
                if path.startswith(prefix) and path.removeprefix(prefix).isdecimal():
                    classes[path] = kind.rpartition(".")[2]
        return list(classes.values())


def _records(program: Any) -> tuple[dict[str, ProgramSite], dict[str, ProgramSite]]:
    """Return the records that hold, and those whose nodes were replaced."""
    nodes = {node.name: node for node in program.graph.nodes}
    lost = {site.name: site for site in stored_records(program.graph.owning_module)}
    carriers: dict[str, list[fx.Node]] = {}
    parts: dict[str | None, set[fx.Node]] = defaultdict(set)
    for node in nodes.values():
        parts[_name_of(node)].add(node)
        if "site" in note(node):
            carriers.setdefault(site_at(node).name, []).append(node)
    found: dict[str, ProgramSite] = {}
    for name, (node, *others) in carriers.items():
        site = site_at(node)
        values = [member.value for member in site.members]
        holds = not others and values[0] == node.name and all(value in nodes and note(nodes[value]) for value in values)
        inside = parts[name]
        holds = holds and {node.name for node in inside if _read_outside(node, inside)} <= set(values)
        read = [nodes.get(name) for name in site.inputs]
        holds = holds and all(one is not None and (one.op == "placeholder" or "site" in note(one)) for one in read)
        (found if holds else lost)[name] = site
    return found, lost


def _read_outside(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether an operation outside of a chain reads a node; a program returns the buffers that it writes to."""
    return any(user not in inside and user.op != "output" for user in node.users)


def _chains(program: Any, known: dict[str, ProgramSite]) -> Iterator[_Chain]:
    """Yield the chains that no record describes, each after those that it reads."""
    chains: dict[str, _Chain] = {}
    for node in program.graph.nodes:
        name = None if node.op in ("placeholder", "output") else _name_of(node)
        if name is not None and name not in known:
            chain = chains.pop(name, None) or _Chain(program, name)
            chain.nodes.append(node)
            chains[name] = chain
    yield from chains.values()


def _name_of(node: fx.Node) -> str | None:
    """Return the tensor whose chain a node is part of."""
    entry = note(node)
    if "site" in entry:
        return site_at(node).name
    if "part" in entry:
        return str(entry["part"])
    for path, _ in _stack(node):
        name = _tensor_at(path)
        if name is not None:
            return name
    return None


def _stack(node: fx.Node) -> Iterator[tuple[str, str]]:
    """Yield the paths and classes of the modules that a node comes from."""
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        yield _IN_STRICT_MODE.sub(r".\1", path.split("@")[0]), name


def _tensor_at(path: str) -> str | None:
    """Return the tensor that a site at `path` computes.

    >>> _tensor_at("encoder.fc.parametrizations.weight"), _tensor_at("encoder.fc")
    ('encoder.fc.weight', None)
    """
    *owner, container, tensor = ["", "", *path.split(".")]
    return ".".join([*filter(None, owner), tensor]) if container == CONTAINER else None


def _computed_from(target: str) -> str | None:
    """Return the tensor that is computed from the stored tensor `target`.

    >>> _computed_from("fc.parametrizations.weight.original0"), _computed_from("fc.parametrizations.weight.0._u")
    ('fc.weight', None)
    """
    path, _, last = target.rpartition(".")
    return _tensor_at(path) if last.startswith("original") else None


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _state(program: Any) -> dict[str, Any]:
    state: dict[str, Any] = program.state if hasattr(program, "state") else program.state_dict
    return state


def _not_renewable(lost: ProgramSite | None) -> str:
    if lost is not None and (len(lost.members) > 1 or (lost.evaluation is not None and lost.inputs)):
        return "its record names nodes that are gone"
    return ""
