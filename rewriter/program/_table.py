"""The TensorTable of an ExportedProgram: a module tree that owns its tensors under their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from rewriter.capture import Capture
from rewriter.planning import Entry, survey
from rewriter.planning._problems import Problems
from rewriter.planning._resolve import Claim
from rewriter.program._insert import Edited, tied
from rewriter.program._recognise import sites_of_program
from rewriter.program._sites import ProgramSite, evaluate, placeholder_values
from rewriter.program._skeleton import is_training, put_in_order, skeleton, with_computed
from rewriter.program._written import is_written
from rewriter.sites import Layout, Member, Site, SiteSpec

_WHY = "the program's graph"


class ProgramTable:
    """What planning needs of a program; see `TensorTable`."""

    foreign: Sequence[tuple[Entry, str]] = ()
    absorbed: Sequence[tuple[Entry, Site]] = ()

    def __init__(self, program: ExportedProgram) -> None:
        self.model = program
        self.training = is_training(program)
        self.entries = _surveyed(program, self.training)

    def refuse(self, claims: Sequence[Claim], problems: Problems) -> None:
        """Refuse options that a program cannot have, and tensors that it writes to."""
        _refuse_options(claims, problems)
        values = values_of(self.model)
        for claim in claims:
            for entry in claim.entries:
                if any(is_written(self.model, name, values[name]) for name in entry.names):
                    problems.about(
                        claim,
                        "select",
                        "written to by the program, and a computed tensor cannot be",
                        "leave it out with `except`",
                        entry.name,
                    )

    def capture(self, owners: Sequence[str]) -> Capture:
        """A program is captured already."""
        return Capture("export", why=_WHY)

    def reached(self, way: Capture, site: Site) -> tuple[str, str]:
        """Every read is a placeholder of the graph."""
        return "export", _WHY


def _refuse_options(claims: Sequence[Claim], problems: Problems) -> None:
    """Refuse options that a program cannot have: it evaluates each chain once a call, and keeps no state."""
    for rule in {claim.rule.name: claim.rule for claim in claims}.values():
        asked: dict[str, tuple[str, str]] = {"cache": (rule.cache, "forward"), "memory": (rule.memory, "keep")}
        if rule.batch == "always":
            asked["batch"] = (rule.batch, "never")
        problems.add(
            rule.where(key).diagnose(
                f"rule {rule.name!r}: an ExportedProgram has no `{key}: {value}`; it evaluates each chain once a call, "
                "in its graph",
                "leave it out, or rewrite the model before it is exported",
            )
            for key, (value, usual) in asked.items()
            if value != usual
        )


def _surveyed(program: ExportedProgram, training: bool) -> list[Entry]:
    state, constants = tied(program.state_dict), program.constants
    sites = sites_of_program(program)
    known = placeholder_values(program)
    for site in sites:
        evaluate(program, site, known)
    root = skeleton(program, {**constants, **state}, training)
    with_computed(root, sites, known)
    put_in_order(root, _names(program, sites))
    owned = {name: site for site in sites for name in site.names}
    stored = {spec.target for spec in program.graph_signature.input_specs if spec.arg.name in _stored(sites)}
    entries = [entry for entry in survey(root) if entry.name not in stored]
    for entry in entries:
        if entry.name in owned:
            entry.site = _present(owned[entry.name])
    return entries


def _names(program: ExportedProgram, sites: list[ProgramSite]) -> list[str]:
    """Return the names of the program's tensors in the order that they had before any was computed."""
    names = {spec.arg.name: str(spec.target) for spec in program.graph_signature.input_specs}
    order = list(names)
    for site in reversed(sites):
        for member in reversed(site.members):
            for slot in reversed(member.slots):
                names[slot.name] = slot.target
                order.insert(order.index(slot.before) if slot.before in order else len(order), slot.name)
    return [names[name] for name in order]


def _stored(sites: list[ProgramSite]) -> set[str]:
    return {name for site in sites for name in (*site.stored, *site.aliases)}


def _present(site: ProgramSite) -> Any:
    members = tuple(
        Member(
            tuple(slot.target for slot in member.slots),
            member.kind,
            tuple(member.shape),
            member.dtype,
            member.persistent,
            member.requires_grad,
        )
        for member in site.members
    )
    record = SiteSpec(
        members=members,
        rule=site.rule,
        chain=tuple(site.chain),
        labels=tuple(site.labels) or (None,) * len(site.chain),
        options=site.options,
        cache="forward",
        stored=(),
        carries=(),
        inputs=(),
        source=None,
        layout=Layout(members[0].shape),
        outer=False,
    )
    return _Present(record)


class _Present:
    """A site that the program has already."""

    def __init__(self, record: SiteSpec) -> None:
        self.spec = record


def values_of(program: ExportedProgram | Edited) -> dict[str, fx.Node]:
    """Return the node that gives each tensor, by the tensor's name."""
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    specs = program.specs if isinstance(program, Edited) else program.graph_signature.input_specs
    found = {str(spec.target): placeholders[spec.arg.name] for spec in specs if spec.target is not None}
    nodes = {node.name: node for node in program.graph.nodes}
    for site in sites_of_program(program):
        for member in site.members:
            found.update({slot.target: nodes[member.value] for slot in member.slots})
    return found


def entries_of(model: nn.Module | ExportedProgram) -> list[Entry]:
    """List the tensors of a module or a program in its own order, computed tensors included."""
    return survey(model) if isinstance(model, nn.Module) else ProgramTable(model).entries
