"""plan and rewrite for ExportedPrograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from rewriter._attach import keep_parameters
from rewriter.capture import Capture
from rewriter.context._random import nothing_drawn
from rewriter.errors import Diagnostic, PlanError
from rewriter.language import Spec
from rewriter.planning._plan import Plan, Site
from rewriter.planning._prepare import Prepared, _build_all, _in_order, _split_present
from rewriter.planning._resolve import Claim, resolve
from rewriter.planning._survey import Entry, survey
from rewriter.planning._writes import writer
from rewriter.program._insert import Edited, insert_site, tied
from rewriter.program._sites import ProgramSite, evaluate, placeholder_values, sites_of_program
from rewriter.program._skeleton import is_training, put_in_order, skeleton, with_computed
from rewriter.sites import Layout, Member, Record, site_path

_WHY = "the program's graph"


class _Standing:
    """A site that the program has already."""

    def __init__(self, record: Record) -> None:
        self.record = record


def plan_program(program: ExportedProgram, spec: Spec) -> Plan:
    """Say what `rewrite_program` would do; the program is only read."""
    prepared, _ = _prepared(program, tied(program.state_dict), program.constants, spec, measure=True)
    built: dict[int, tuple[Any, bool]] = {id(claim.entries[0]): (site, False) for claim, site in prepared.new}
    built |= {id(claim.entries[0]): (site, True) for claim, site in prepared.present}
    sites = [
        Site(site.record, "export", _WHY, prepared.moved.get(site, 0.0), present)
        for entry in prepared.entries
        if id(entry) in built
        for site, present in [built[id(entry)]]
    ]
    return Plan(tuple(sites), spec.source, "export", _WHY)


def survey_program(program: ExportedProgram) -> list[Entry]:
    """List the tensors of a program in its own order, as `survey` does for a module."""
    return _surveyed(program, tied(program.state_dict), program.constants, is_training(program))


def rewrite_program(program: ExportedProgram, spec: Spec, *, inplace: bool = False) -> ExportedProgram:
    """Return a program in which the selected tensors are computed; see `rewriter.rewrite`.

    Raises:
        PlanError: the spec does not fit the program.
        CaptureError: a chain cannot be exported.
    """
    edited = Edited(program, share=inplace)
    prepared, training = _prepared(program, edited.state, edited.constants, spec)
    if not prepared.new:
        return program if inplace else edited.finish()
    for claim, _ in prepared.new:
        for entry in claim.entries:
            for name in entry.names:
                _refuse_written(edited, name)
    tensors = [entry.tensor for claim, _ in prepared.new for entry in claim.entries if entry.tensor is not None]
    before = [(tensor, tensor.data, tensor.data.clone(), tensor.requires_grad) for tensor in tensors if inplace]
    keep_parameters(prepared)
    try:
        for _, site in prepared.new:
            with nothing_drawn(tensors):
                insert_site(edited, site, site_path(site), _values(edited), training)
    except BaseException:
        for tensor, data, content, trained in before:
            tensor.data, tensor.requires_grad = data.copy_(content), trained
        raise
    return edited.finish()


def _prepared(
    program: ExportedProgram,
    state: Mapping[str, Any],
    constants: Mapping[str, Any],
    spec: Spec,
    *,
    measure: bool = False,
) -> tuple[Prepared, bool]:
    if spec.absorb:
        raise PlanError("an ExportedProgram has nothing to absorb; absorb the model before it is exported")
    training = is_training(program)
    entries = _surveyed(program, state, constants, training)
    claims, problems = resolve(spec, entries)
    problems += _unsupported(claims)
    present, claims = _split_present(claims, problems)
    claims = _in_order(claims, entries, problems)
    prepared = Prepared(spec, entries, Capture("export", why=_WHY))
    if not problems:
        _build_all(prepared, claims, problems, measure)
    if problems:
        raise PlanError.of(problems)
    prepared.present = present
    # Sites that others read come first: a program runs from top to bottom.
    prepared.new.reverse()
    return prepared, training


def _unsupported(claims: Sequence[Claim]) -> list[Diagnostic]:
    """Refuse what rules ask for and a program cannot do: it evaluates each chain once a call, and keeps no state."""
    problems: list[Diagnostic] = []
    for rule in {claim.rule.name: claim.rule for claim in claims}.values():
        asked: dict[str, tuple[str, str]] = {"cache": (rule.cache, "forward"), "memory": (rule.memory, "keep")}
        if rule.batch == "always":
            asked["batch"] = (rule.batch, "never")
        for key, (value, usual) in asked.items():
            if value != usual:
                problems.append(
                    rule.where(key).diagnose(
                        f"rule {rule.name!r}: an ExportedProgram has no `{key}: {value}`; it evaluates each chain once "
                        "a call, in its graph",
                        "leave it out, or rewrite the model before it is exported",
                    )
                )
    return problems


def _surveyed(
    program: ExportedProgram, state: Mapping[str, Any], constants: Mapping[str, Any], training: bool
) -> list[Entry]:
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
    record = Record(
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
    return _Standing(record)


def _values(edited: Edited) -> dict[str, fx.Node]:
    placeholders = edited.placeholders()
    found = {str(spec.target): placeholders[spec.arg.name] for spec in edited.specs if spec.target is not None}
    nodes = {node.name: node for node in edited.graph.nodes}
    for site in sites_of_program(edited):  # type: ignore[arg-type]
        for member in site.members:
            found.update({slot.target: nodes[member.value] for slot in member.slots})
    return found


def _refuse_written(edited: Edited, name: str) -> None:
    """Refuse a tensor that the program writes to, such as the statistics of a batch norm in train mode."""
    node = _values(edited)[name]
    written = {spec.target for spec in edited.signature.output_specs if spec.target is not None}
    if writer(node) is not None or any(_trains(user, node) for user in node.users):
        written.add(name)
    if name in written:
        raise PlanError(f"{name} is written to by the program; a computed tensor cannot be: leave it out with `except`")


def _trains(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` is a batch norm that writes its statistics, which its schema does not say."""
    schema = getattr(user.target, "_schema", None)
    arguments = {} if schema is None else dict(zip((a.name for a in schema.arguments), user.args, strict=False))
    trains = arguments.get("training") is True or arguments.get("use_input_stats") is True
    statistics = [arguments.get("running_mean"), arguments.get("running_var")] if trains else []
    return any(value is node for value in statistics)
