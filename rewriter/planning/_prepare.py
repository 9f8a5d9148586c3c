"""Everything that is decided before a model is touched: claims, capture, and the sites, built and proven."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rewriter._given import is_distributed
from rewriter.capture import Call, Capture
from rewriter.context import Contexts
from rewriter.context._fingerprint import version_of
from rewriter.errors import Diagnostic
from rewriter.language import Rule, Spec
from rewriter.planning._build import Description, Measures, build, check_value, describe
from rewriter.planning._chain import BuildError, Chain
from rewriter.planning._fit import Fitted, fitted_together
from rewriter.planning._module_table import ModuleTable
from rewriter.planning._origin import Origin
from rewriter.planning._plan import Pair, Plan
from rewriter.planning._problems import Problems
from rewriter.planning._prove import prove, prove_batches
from rewriter.planning._refusals import refuse_statistics, refuse_writes
from rewriter.planning._resolve import Claim, nearest, resolve
from rewriter.planning._survey import Entry
from rewriter.planning._table import TensorTable
from rewriter.planning._together import planned_together
from rewriter.sites import Site
from rewriter.sites._gathered import drawn_alike


def prepare(
    model: nn.Module, spec: Spec, mode: str = "auto", *, call: Call | None = None, without: Collection[str] = ()
) -> Plan:
    """Plan a module that no other tool has parametrized; see `make_plan`."""
    return make_plan(ModuleTable(model, mode, call), spec, without=without)


def make_plan(
    table: TensorTable,
    spec: Spec,
    *,
    measure: bool = False,
    without: Collection[str] = (),
    origin: Origin | None = None,
) -> Plan:
    """Resolve, capture, build and prove; the model is only read.

    Arguments:
        table: the model.
        spec: the rules.
        measure: whether to find how far each value moves.
        without: passes that will be left out.
        origin: the model that the user gave, for a plan that is returned to the user.

    Raises:
        PlanError: the spec does not fit the model; every reason is listed.
        CaptureError: the capture asked for is not possible.
    """
    for entry, site in table.absorbed:
        entry.site = site
    claims, found = resolve(spec, [*table.entries, *(entry for entry, _ in table.foreign)])
    problems = Problems(found)
    present, claims = _split_present(claims, problems)
    tools = {id(entry): tool for entry, tool in table.foreign}
    claims = [claim for claim in claims if not _refused(claim, tools, problems)]
    claims = _in_order(claims, table.entries, problems)
    table.refuse(claims, problems)
    problems.raise_any()
    owned = [claim.entries for claim, _ in present] + [claim.entries for claim in claims]
    owned += [[entry] for entry, _ in table.absorbed]
    way = table.capture([name.rpartition(".")[0] for entries in owned for entry in entries for name in entry.names])
    problems.add(refuse_writes(claims, way.graph))
    values = _Values(table.entries)
    measures: dict[Site, Measures] = {}
    with drawn_alike(entry.tensor for claim in claims for entry in claim.entries):
        new = _build_all(claims, values, problems, measures if measure else None)
    if not problems:
        problems.add(_proven(spec, table, way, new, present, values, without))
    problems.raise_any()
    return Plan(spec, table, way, tuple(new), tuple(present), measures, origin)


def _proven(
    spec: Spec,
    table: TensorTable,
    way: Capture,
    new: Sequence[Pair],
    present: Sequence[Pair],
    values: _Values,
    without: Collection[str],
) -> list[Diagnostic]:
    """Prove what the passes will assume of the new sites; a program has no passes."""
    if not isinstance(table, ModuleTable):
        return []
    rules = {rule.name: rule for rule in spec.rules}
    fresh = [site for _, site in (*reversed(new), *table.absorbed)]
    problems = prove(fresh, rules, lambda site: [values[name] for name in site.spec.reads], without)
    old = [site for _, site in present]
    return problems + prove_batches([*old, *fresh] if fresh else [], rules, way, without)


def _split_present(claims: Iterable[Claim], problems: Problems) -> tuple[list[Pair], list[Claim]]:
    """Separate the claims whose parametrization the model has already."""
    present: list[Pair] = []
    new: list[Claim] = []
    for claim in claims:
        site = next((entry.site for entry in claim.entries if entry.site is not None), None)
        if site is None:
            new.append(claim)
        elif site.spec.rule == claim.rule.name and (*site.spec.identity, site.spec.labels) == _identity(claim.rule):
            present.append((claim, site))
        else:
            has, wanted = _printed(*site.spec.identity, site.spec.labels), _printed(*_identity(claim.rule))
            problems.about(
                claim,
                "select",
                f"already parametrized by rule {site.spec.rule!r} ({has}); rule {claim.rule.name!r} wants {wanted}",
                "bake the model first, or leave the tensor out with `except`",
            )
    return present, new


def _identity(rule: Rule) -> tuple[tuple[str, ...], str, tuple[str | None, ...]]:
    return *describe(rule), tuple(step.label for step in rule.chain)


def _printed(chain: Sequence[str], options: str, labels: Sequence[str | None]) -> str:
    steps = [step if label is None else f"{label}: {step}" for step, label in zip(chain, labels, strict=True)]
    return " >> ".join(steps) + (f", {options}" if options else "")


def _refused(claim: Claim, tools: Mapping[int, str], problems: Problems) -> bool:
    for entry in claim.entries:
        if id(entry) in tools:
            problems.about(
                claim,
                "select",
                f"computed already, by {tools[id(entry)]}",
                "take it over (`absorb: true` in the spec, or rewriter.absorb(model)), or use `except`",
                entry.name,
            )
            return True
        if entry.tensor is not None and is_lazy(entry.tensor):
            problems.about(
                claim,
                "select",
                "in a lazy module and without a shape",
                "run the model once, then rewrite it",
                entry.name,
            )
            return True
    return refuse_statistics(claim, problems)


def _in_order(claims: list[Claim], entries: Sequence[Entry], problems: Problems) -> list[Claim]:
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
            problems.add([claim.rule.location.diagnose(f"{claim.name} is computed from itself: {circle}")])
            return
        state[id(claim)] = "open"
        for name in reads_of(claim.rule):
            if name not in known:
                problems.about(
                    claim,
                    "from" if claim.rule.source == name else "chain",
                    f"computed from {name!r}, which the model does not have",
                    nearest(name, [entry for entry in entries if entry not in claim.entries]),
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
def _build_all(
    claims: Sequence[Claim],
    values: _Values,
    problems: Problems,
    measures: dict[Site, Measures] | None,
) -> list[Pair]:
    """Build the sites of all claims, and return them in the order of `claims`: each before the sites that it reads.

    Arguments:
        measures: takes what is measured of each value; ``None`` checks shape and dtype alone, once for each form.
    """
    shared: dict[str, list[nn.Module]] = {}
    chains: dict[int, Chain] = {}
    fitted: dict[int, Fitted] = {}
    descriptions: dict[str, Description] = {}
    contexts = Contexts()
    checked: set[object] = set()
    built: list[Pair] = []
    for claim in reversed(claims):
        rule = claim.rule
        given = shared.get(rule.name)
        before = _marks(given or ())
        try:
            inputs = {name: values[name] for name in reads_of(rule)}
            if rule.name not in descriptions:
                descriptions[rule.name] = describe(rule)
                own = [other for other in claims[::-1] if other.rule.name == rule.name]
                chains |= planned_together(own, inputs)
                fitted |= fitted_together(rule, own)
            together = fitted.get(id(claim))
            chain = None
            if together is None:
                chain = chains.pop(id(claim), None) or Chain(claim, inputs, given)
            checks = (inputs, checked, measures)
            try:
                site = _built(claim, descriptions[rule.name], contexts, checks, chain, together)
            except BuildError:
                if not is_distributed(claim.entries[0].tensor):
                    raise
                # The steps do not work on tensors that are distributed over processes: they get whole ones.
                chain = Chain(claim, inputs, given, gather=True)
                site = _built(claim, descriptions[rule.name], contexts, checks, chain)
            if given is not None:
                _refuse_fitted(given, before)
        except BuildError as problem:
            problems.build_failed(claim, str(problem))
            continue
        if rule.share:
            shared.setdefault(rule.name, site.steps)
        built.append((claim, site))
        values.add(claim, site)
    return built[::-1]


def _marks(steps: Iterable[nn.Module]) -> list[tuple[Tensor, int]]:
    """Return the tensors of steps, and how often each was written to."""
    return [(one, version_of(one)) for step in steps for one in (*step.parameters(), *step.buffers())]


def _refuse_fitted(steps: Sequence[nn.Module], before: Sequence[tuple[Tensor, int]]) -> None:
    """Refuse steps that several tensors share if they are fitted to a tensor: the others would lose their value.

    Raises:
        BuildError: names the steps.
    """
    now = _marks(steps)
    same = len(now) == len(before) and all(
        one is other and version == former for (one, version), (other, former) in zip(now, before, strict=True)
    )
    if not same or any(getattr(step, "stateful", False) for step in steps):
        raise BuildError(
            f"`share: true` gives one {' >> '.join(type(step).__name__ for step in steps)} to several tensors, and it "
            "is fitted to each tensor on its own: leave `share` out"
        )


_Checks = tuple[Mapping[str, Tensor], set[object], dict[Site, Measures] | None]


def _built(
    claim: Claim,
    description: Description,
    contexts: Contexts,
    checks: _Checks,
    chain: Chain | None,
    together: Fitted | None = None,
) -> Site:
    """Build a site and check its value."""
    inputs, checked, measures = checks
    site = build(claim, description, contexts, chain=chain, fitted=together)
    # What decides which shape and dtype the value has: sites of one form are looked at once.
    wanted = tuple((member.shape, member.dtype) for member in site.spec.members)
    taken = tuple(
        (tensor.shape, tensor.dtype, tensor.device, getattr(tensor, "placements", None))
        for tensor in (*site.originals, *inputs.values())
    )
    form = (site.spec.rule, wanted, taken)
    if measures is not None or form not in checked:
        measured = check_value(claim, site, inputs, measure=measures is not None)
        checked.add(form)
        if measures is not None:
            measures[site] = measured
    return site


class _Values:
    """The tensors that chains read, with the values that their own chains will give them."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.sites: dict[str, tuple[Site, int]] = {}
        for entry in entries:
            if entry.tensor is not None:
                self.tensors.update(dict.fromkeys(entry.names, entry.tensor))
            elif entry.site is not None:
                place = (entry.site, entry.site.position(entry.name.rpartition(".")[2]))
                self.sites.update(dict.fromkeys(entry.names, place))

    def add(self, claim: Claim, site: Site) -> None:
        for index, entry in enumerate(claim.entries):
            self.sites.update(dict.fromkeys(entry.names, (site, index)))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sites:
            return self.tensors[name].detach()
        site, index = self.sites[name]
        with torch.no_grad():
            value = site.read(*[self[read] for read in site.spec.reads])
        result: Tensor = value if len(site.spec.members) == 1 else value[index]
        return result
