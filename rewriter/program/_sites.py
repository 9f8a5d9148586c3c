"""What a program remembers of its sites: plain data in the metadata of nodes, which torch.export.save keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from rewriter.context._random import nothing_drawn
from rewriter.errors import ModelFileError
from rewriter.serialization._graph_data import graph_from_data

CUSTOM = "custom"
KEY = "reparam"


@dataclass
class Slot:
    """One name of a computed tensor, as the program had it before.

    Arguments:
        name: the placeholder's name.
        target: the tensor's name in the state dict.
        before: the placeholder that came after it; ``""`` for the last one.
        used: names of the nodes that read it.
    """

    name: str
    target: str
    before: str
    used: list[str]


@dataclass
class Computed:
    """One computed tensor: its names, and what it was.

    Arguments:
        value: the node that computes it.
        kind: ``"parameter"`` or ``"buffer"``.
        persistent: whether a buffer was part of the state dict.
        requires_grad: whether it was trained.
        slots: its places in the program's signature; more than one for a tied tensor.
    """

    value: str
    kind: str
    persistent: bool
    requires_grad: bool
    shape: list[int]
    dtype: str
    slots: list[Slot] = field(default_factory=list)


@dataclass
class ProgramSite:
    """One site of a program.

    Arguments:
        rule: the rule that owns it.
        chain: its steps, as printed.
        options: what else decides the value, printed.
        members: the tensors computed.
        originals: placeholders of the stored tensors, in order.
        stored: placeholders of everything that the chain brought along.
        inputs: nodes of the program that it reads.
        frozen: whether the stored tensor is not trained while the one it replaced may have been.
        aliases: placeholders that name the stored tensors once more, for the further names of a tied tensor.
        evaluation: in a program for training, the chain in evaluation mode, where that is another one.
        labels: the steps' labels.
    """

    rule: str
    chain: list[str]
    options: str
    members: list[Computed]
    originals: list[str]
    stored: list[str]
    inputs: list[str]
    frozen: bool
    aliases: list[str] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    labels: list[str | None] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first name."""
        return self.members[0].slots[0].target

    @property
    def names(self) -> list[str]:
        """All names of all members."""
        return [slot.target for member in self.members for slot in member.slots]


def write_site(node: fx.Node, site: ProgramSite) -> None:
    """Keep `site` at the node of its first value."""
    node.meta[CUSTOM] = {**(node.meta.get(CUSTOM) or {}), KEY: {"site": asdict(site)}}


def mark(node: fx.Node, name: str) -> None:
    """Mark a node as part of the chain of the site `name`."""
    node.meta[CUSTOM] = {**(node.meta.get(CUSTOM) or {}), KEY: {"part": name}}


def note(node: fx.Node) -> dict[str, Any]:
    """Return our entry in a node's metadata."""
    custom = node.meta.get(CUSTOM)
    entry = custom.get(KEY) if isinstance(custom, dict) else None
    return entry if isinstance(entry, dict) else {}


def site_at(node: fx.Node) -> ProgramSite:
    """Return the record at a node that has one.

    Raises:
        ModelFileError: it is damaged.
    """
    return _read(note(node)["site"])


def store_records(graph_module: fx.GraphModule) -> None:
    """Keep the records of a graph in its metadata too: decompositions remove nodes that do nothing."""
    records = [note(node)["site"] for node in graph_module.graph.nodes if "site" in note(node)]
    custom = {name: value for name, value in (graph_module.meta.get(CUSTOM) or {}).items() if name != KEY}
    graph_module.meta[CUSTOM] = {**custom, **({KEY: {"sites": records}} if records else {})}


def stored_records(graph_module: fx.GraphModule) -> list[ProgramSite]:
    """Return the records in the metadata of a graph.

    Raises:
        ModelFileError: one is damaged.
    """
    custom = graph_module.meta.get(CUSTOM)
    entry = custom.get(KEY) if isinstance(custom, dict) else None
    return [_read(data) for data in (entry.get("sites") or () if isinstance(entry, dict) else ())]


def _read(data: Any) -> ProgramSite:
    try:
        members = [
            Computed(**{**member, "slots": [Slot(**slot) for slot in member["slots"]]}) for member in data["members"]
        ]
        return ProgramSite(**{**data, "members": members})
    except (TypeError, KeyError) as problem:
        raise ModelFileError(f"the program's record of its parametrizations is damaged: {problem}") from problem


def placeholder_values(program: ExportedProgram) -> dict[str, Tensor]:
    """Return the tensors that the program holds, by their placeholders' names."""
    tensors: dict[str, Any] = {**program.constants, **program.state_dict}
    found: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        value = tensors.get(spec.target) if spec.target is not None else None
        if isinstance(value, Tensor):
            found[spec.arg.name] = value
    return found


@torch.no_grad()
def evaluate(program: ExportedProgram, site: ProgramSite, known: dict[str, Tensor]) -> list[Tensor]:
    """Return the values of a site's members in evaluation mode; no state advances.

    Arguments:
        known: values of placeholders and of the nodes that the site reads; what is found out is added.
    """
    with nothing_drawn(known[name] for name in (*site.stored, *site.inputs)):
        if site.evaluation is not None:
            graph = graph_from_data(site.evaluation, torch.nn.Module())
            module = fx.GraphModule(torch.nn.Module(), graph)
            given = [known[name].clone() for name in (*site.stored, *site.inputs)]
            values = list(module(*given))
            known.update(zip((member.value for member in site.members), values, strict=True))
            return values
        parts = set(site.names)
        own: dict[str, Any] = {name: known[name].clone() for name in site.stored}
        for node in program.graph.nodes:
            if node.op == "placeholder" or (note(node).get("part") not in parts and not _is_value(node, site)):
                continue
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda read: own[read.name] if read.name in own else known[read.name]
            )
            if node.op == "get_attr":
                own[node.name] = getattr(program.graph_module, str(node.target))
            else:
                assert callable(node.target)
                own[node.name] = node.target(*args, **kwargs)
    values = [own[member.value] for member in site.members]
    known.update(zip((member.value for member in site.members), values, strict=True))
    return values


def _is_value(node: fx.Node, site: ProgramSite) -> bool:
    return "site" in note(node) and node.name == site.members[0].value
