"""Everything that is decided before a model is touched: claims, capture, and the sites themselves, built aside."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from rewriter.bindings import RewrittenModule
from rewriter.capture import (
    Call,
    Capture,
    capture,
    difference,
    export_capture,
    has_hooks,
    is_torch_leaf,
    opens_up,
    part_with,
)
from rewriter.context import Session
from rewriter.errors import CaptureError, Diagnostic, PlanError
from rewriter.language import Rule, Spec
from rewriter.planning._build import Description, build, check_value, describe
from rewriter.planning._construct import BuildError, Extra
from rewriter.planning._fit import Fitted, fitted_together
from rewriter.planning._plan import Plan, Site
from rewriter.planning._prove import prove, prove_batches
from rewriter.planning._resolve import Claim, nearest, resolve
from rewriter.planning._sharded import refuse_sharded
from rewriter.planning._survey import Entry, refuse_strays, survey
from rewriter.planning._together import planned_together
from rewriter.planning._writes import refuse_statistics, refuse_writes
from rewriter.sites import ParametrizedTensor, Record

if TYPE_CHECKING:
    from rewriter.absorbing import Taken


@dataclass
class Prepared:
    """A rewriting that will succeed: nothing in the model has changed yet.

    Arguments:
        entries: the model's tensors.
        capture: the way into the model.
        new: claims with the sites built for them, each one before the sites it reads.
        present: sites that the model has already.
        moved: how far each new site's value moves.
        absorbed: sites taken over from other tools.
    """

    spec: Spec
    entries: list[Entry]
    capture: Capture
    new: list[tuple[Claim, ParametrizedTensor]] = field(default_factory=list)
    present: list[tuple[Claim, ParametrizedTensor]] = field(default_factory=list)
    moved: dict[ParametrizedTensor, float | None] = field(default_factory=dict)
    absorbed: list[tuple[Entry, ParametrizedTensor]] = field(default_factory=list)

    @property
    def standing(self) -> list[ParametrizedTensor]:
        """The sites that the model has already, whether or not a rule of this spec owns them."""
        fresh = {id(site) for _, site in self.absorbed}
        sites = dict.fromkeys(entry.site for entry in self.entries if entry.site is not None)
        return [site for site in sites if id(site) not in fresh]


def prepare(
    model: nn.Module,
    spec: Spec,
    mode: str,
    *,
    measure: bool = False,
    taken: Sequence[Taken] = (),
    call: Call | None = None,
    without: Collection[str] = (),
) -> Prepared:
    """Resolve, capture, build and prove; the model is only read.

    Arguments:
        model: the model.
        spec: what to put into it.
        mode: how to capture it.
        measure: whether to find how far each value moves.
        taken: tensors taken over from other tools, which the model holds as plain ones.
        call: example inputs.
        without: passes that will be left out.

    Raises:
        PlanError: the spec does not fit the model; every reason is listed.
        CaptureError: `mode` asks for a graph and there is none.
    """
    from rewriter.absorbing._take import held_entries, sites_for  # it surveys models with what is defined here

    entries = survey(model)
    if isinstance(model, fx.GraphModule):
        refuse_strays(model, {entry.site for entry in entries})
    absorbed = sites_for(taken, entries)
    for entry, site in absorbed:
        entry.site = site
    held = held_entries(model)
    claims, problems = resolve(spec, [*entries, *(entry for entry, _ in held)])
    present, claims = _split_present(claims, problems)
    holders = {id(entry): source for entry, source in held}
    claims = [claim for claim in claims if not _refused(claim, holders, problems)]
    claims = _in_order(claims, entries, problems)
    problems += refuse_sharded(model, claims)
    if problems:
        raise PlanError.of(problems)
    owners = [name.rpartition(".")[0] for claim, _ in present for entry in claim.entries for name in entry.names]
    owners += [name.rpartition(".")[0] for claim in claims for entry in claim.entries for name in entry.names]
    owners += [name.rpartition(".")[0] for entry, _ in absorbed for name in entry.names]
    prepared = Prepared(spec, entries, _way(model, owners, mode, call), present=present, absorbed=absorbed)
    problems += refuse_writes(claims, prepared.capture.graph)
    values = _build_all(prepared, claims, problems, measure)
    if not problems:
        problems += _proven(prepared, values, without)
    if problems:
        raise PlanError.of(problems)
    return prepared


def _proven(prepared: Prepared, values: _Values, without: Collection[str]) -> list[Diagnostic]:
    rules = {rule.name: rule for rule in prepared.spec.rules}
    fresh = [site for _, site in (*reversed(prepared.new), *prepared.absorbed)]
    problems = prove(fresh, rules, lambda site: [values[name] for name in site.record.reads], without)
    present = [site for _, site in prepared.present]
    return problems + prove_batches([*present, *fresh] if fresh else [], rules, prepared.capture, without)


def _way(model: nn.Module, owners: Sequence[str], mode: str, call: Call | None) -> Capture:
    """Capture the model, and compare what was captured with it where there is a call to compare on."""
    if mode == "export" and not isinstance(model, RewrittenModule):
        return export_capture(model, call)
    way = capture(model, owners, "auto" if mode == "export" else mode)
    if call is None or way.graph is None or isinstance(model, fx.GraphModule):
        return way
    text = difference(model, way.graph, call)
    if not text:
        return way
    why = f"the traced graph is not the model: on the example inputs {text}"
    if mode == "graph":
        raise CaptureError(f"{type(model).__name__}: {why}; use capture='module'")
    return Capture("module", why=why)


def plan_of(model: nn.Module, prepared: Prepared) -> Plan:
    """Return what was prepared as a plan."""
    built = {id(claim.entries[0]): (site, False) for claim, site in prepared.new}
    built |= {id(claim.entries[0]): (site, True) for claim, site in prepared.present}
    built |= {id(entry): (site, False) for entry, site in prepared.absorbed}
    sites = []
    uses = _uses_by_target(prepared.capture)
    for entry in prepared.entries:
        if id(entry) in built:
            site, present = built[id(entry)]
            how, why = _how_captured(model, prepared.capture, uses, site)
            if present and how == "unused" and isinstance(model, RewrittenModule):
                how, why = "graph", "as it was rewritten before"
            fused = tuple((start + 1, stop) for start, stop in site.fused)
            sites.append(Site(site.record, how, why, prepared.moved.get(site, 0.0), present, fused))
    return Plan(tuple(sites), prepared.spec.source, prepared.capture.root, prepared.capture.why)


def _split_present(
    claims: Iterable[Claim], problems: list[Diagnostic]
) -> tuple[list[tuple[Claim, ParametrizedTensor]], list[Claim]]:
    present: list[tuple[Claim, ParametrizedTensor]] = []
    new: list[Claim] = []
    for claim in claims:
        site = next((entry.site for entry in claim.entries if entry.site is not None), None)
        if site is None:
            new.append(claim)
        elif _same_plan(site.record, claim.rule):
            present.append((claim, site))
        else:
            has, wanted = _printed(*site.record.identity, site.record.labels), _printed(*_identity(claim.rule))
            problems.append(
                claim.rule.location.diagnose(
                    f"{claim.name} is already parametrized by rule {site.record.rule!r} ({has}); "
                    f"rule {claim.rule.name!r} wants {wanted}",
                    "bake the model first, or leave the tensor out with `except`",
                )
            )
    return present, new


def _identity(rule: Rule) -> tuple[tuple[str, ...], str, tuple[str | None, ...]]:
    return *describe(rule), tuple(step.label for step in rule.chain)


def _same_plan(record: Record, rule: Rule) -> bool:
    return record.rule == rule.name and (*record.identity, record.labels) == _identity(rule)


def _printed(chain: Sequence[str], options: str, labels: Sequence[str | None]) -> str:
    steps = [step if label is None else f"{label}: {step}" for step, label in zip(chain, labels, strict=True)]
    return " >> ".join(steps) + (f", {options}" if options else "")


def _refused(claim: Claim, holders: Mapping[int, str], problems: list[Diagnostic]) -> bool:
    for entry in claim.entries:
        if id(entry) in holders:
            problems.append(
                claim.rule.where("select").diagnose(
                    f"{entry.name} is computed already, by {holders[id(entry)]}",
                    "take it over (`absorb: true` in the spec, or rewriter.absorb(model)), or use `except`",
                )
            )
            return True
        if entry.tensor is not None and is_lazy(entry.tensor):
            problems.append(
                claim.rule.where("select").diagnose(
                    f"{entry.name} belongs to a lazy module and has no shape yet",
                    "run the model once, then rewrite it",
                )
            )
            return True
    problem = refuse_statistics(claim)
    if problem is not None:
        problems.append(problem)
    return problem is not None


def _in_order(claims: list[Claim], entries: Sequence[Entry], problems: list[Diagnostic]) -> list[Claim]:
    """Sort the claims so that each comes before those it reads; report unknown names and circles."""
    if not any(reads_of(rule) for rule in {id(claim.rule): claim.rule for claim in claims}.values()):
        return claims[::-1]
    known = {name for entry in entries for name in entry.names}
    owner = {name: claim for claim in claims for entry in claim.entries for name in entry.names}
    ordered: list[Claim] = []
    state: dict[int, str] = {}

    def visit(claim: Claim, trail: tuple[str, ...]) -> None:
        if state.get(id(claim)) == "done":
            return
        if state.get(id(claim)) == "open":
            circle = " → ".join((*trail, claim.name))
            problems.append(claim.rule.location.diagnose(f"{claim.name} is computed from itself: {circle}"))
            return
        state[id(claim)] = "open"
        for name in reads_of(claim.rule):
            if name not in known:
                problems.append(
                    claim.rule.where("from" if claim.rule.source == name else "chain").diagnose(
                        f"{claim.name} is computed from {name!r}, which the model does not have",
                        nearest(name, [entry for entry in entries if entry not in claim.entries]),
                    )
                )
            elif name in owner:
                visit(owner[name], (*trail, claim.name))
        state[id(claim)] = "done"
        ordered.append(claim)

    for claim in claims:
        visit(claim, ())
    return ordered[::-1]


def reads_of(rule: Rule) -> list[str]:
    """Return the names of the further tensors that a rule's chain takes."""
    source = [rule.source] if rule.source is not None else []
    return source + [name for step in rule.chain for name in step.inputs]


@torch.no_grad()
def _build_all(prepared: Prepared, claims: Sequence[Claim], problems: list[Diagnostic], measure: bool) -> _Values:
    values = _Values(prepared)
    shared: dict[str, list[nn.Module]] = {}
    extra: dict[int, Extra] = {}
    fitted: dict[int, Fitted] = {}
    planned: set[str] = set()
    failures: dict[tuple[str, str], list[str]] = {}
    rules: dict[str, Rule] = {}
    descriptions: dict[str, Description] = {}
    session = Session()
    checked: set[object] = set()
    built: list[tuple[Claim, ParametrizedTensor]] = []
    for claim in reversed(claims):
        rule = claim.rule
        if rule.name not in rules:
            rules[rule.name] = rule
            descriptions[rule.name] = describe(rule)
        try:
            inputs = {name: values[name] for name in reads_of(rule)}
            if rule.name not in planned:
                planned.add(rule.name)
                own = [other for other in claims[::-1] if other.rule.name == rule.name]
                extra |= planned_together(own, inputs)
                fitted |= fitted_together(rule, own)
            known, further, made = shared.get(rule.name), extra.get(id(claim)), fitted.get(id(claim))
            site = build(claim, inputs, descriptions[rule.name], session, known, further, made)
            form = _form(site, inputs.values())
            if measure or form not in checked:
                prepared.moved[site] = check_value(claim, site, inputs, measure=measure)
                checked.add(form)
        except BuildError as problem:
            failures.setdefault((rule.name, str(problem)), []).append(claim.name)
            continue
        if rule.share:
            shared.setdefault(rule.name, site.steps)
        built.append((claim, site))
        values.add(claim, site)
    prepared.new += reversed(built)
    for (name, text), sites in failures.items():
        more = f" (and {len(sites) - 1} more sites)" if len(sites) > 1 else ""
        problems.append(rules[name].where("chain").diagnose(f"rule {name!r} on {sites[-1]}{more}: {text}"))
    return values


def _form(site: ParametrizedTensor, inputs: Iterable[Tensor]) -> object:
    """Return what decides which shape and dtype a site's value has: sites of one form are looked at once."""
    wanted = tuple((member.shape, member.dtype) for member in site.record.members)
    taken = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in (*site.originals, *inputs))
    return site.record.rule, wanted, taken


class _Values:
    """The tensors that chains read, with the values that their own chains will give them."""

    def __init__(self, prepared: Prepared) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.sites: dict[str, tuple[ParametrizedTensor, int]] = {}
        for entry in prepared.entries:
            if entry.tensor is not None:
                self.tensors.update(dict.fromkeys(entry.names, entry.tensor))
        for claim, site in prepared.present:
            self.add(claim, site)

    def add(self, claim: Claim, site: ParametrizedTensor) -> None:
        for index, entry in enumerate(claim.entries):
            self.sites.update(dict.fromkeys(entry.names, (site, index)))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sites:
            return self.tensors[name].detach()
        site, index = self.sites[name]
        with torch.no_grad():
            value = site.read(*[self[read] for read in site.record.reads])
        result: Tensor = value if len(site.record.members) == 1 else value[index]
        return result


Uses = dict[tuple[str, str], bool]


def _uses_by_target(way: Capture) -> Uses:
    """Say for every read and every call of the graph whether its result is used."""
    uses: Uses = {}
    for node in way.graph.nodes if way.graph is not None else ():
        if node.op in ("get_attr", "call_module"):
            uses[node.op, node.target] = bool(node.users) or uses.get((node.op, node.target), False)
    return uses


def _how_captured(model: nn.Module, way: Capture, uses: Uses, site: ParametrizedTensor) -> tuple[str, str]:
    if way.root in ("module", "export"):
        return way.root, way.why or "the graph that torch.export made"
    ways: dict[tuple[str, str], None] = {}
    for name in site.record.names:
        path, _, _ = name.rpartition(".")
        ways.update(dict.fromkeys(_ways(model, way, uses, name, path)))
    if not ways:
        return "unused", "no forward of the model reads it"
    first = next(iter(ways))
    return first if len(ways) == 1 else (first[0], "; ".join(dict.fromkeys(why for _, why in ways if why)))


def _how_called(model: nn.Module, path: str, name: str) -> tuple[str, str]:
    module = model.get_submodule(path)
    kind = type(module).__name__
    if has_hooks(module):
        return "handed", f"{path} ({kind}) has hooks, which keep it one call"
    if opens_up(module, name.removeprefix(f"{path}.")):
        return "opened", f"{kind} as a function of its tensors"
    if is_torch_leaf(module):
        return "handed", f"{path} ({kind}) takes its tensors by name"
    return "handed", f"{path} ({kind}) is one node of the graph"


def _ways(model: nn.Module, way: Capture, uses: Uses, name: str, path: str) -> Iterable[tuple[str, str]]:
    if ("get_attr", name) in uses:
        yield ("graph", "read directly") if uses["get_attr", name] else ("unused", "read, and not used")
    prefix = path
    while True:
        if ("call_module", prefix) in uses:
            if prefix in way.opaque:
                yield "handed", f"{prefix or 'the root'} stays one node: {way.opaque[prefix]}"
            else:
                inner = part_with(model.get_submodule(prefix), name.removeprefix(f"{prefix}."))
                yield _how_called(model, f"{prefix}.{inner}" if inner else prefix, name)
        if not prefix:
            return
        prefix = prefix.rpartition(".")[0]
