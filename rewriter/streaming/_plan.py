"""The plan of a checkpoint: a spec resolved against headers, and the work that `bake` and `apply` make of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter._given import kind_of
from rewriter.context._random import nothing_drawn
from rewriter.errors import ModelFileError, NumericError, PlanError
from rewriter.language import Rule, Spec
from rewriter.planning import Entry, ModuleTable, Plan, dtype_name, make_plan
from rewriter.planning._plan import Pair
from rewriter.planning._table import TensorTable
from rewriter.serialization._safetensors import KEY
from rewriter.sites import Site
from rewriter.sites._container import path_for
from rewriter.sites._identity import difference, identity
from rewriter.streaming._checkpoint import CHAINS, FORMS, Checkpoint, open_checkpoint
from rewriter.streaming._groups import Group, entries_of, groups_of, stored_form
from rewriter.streaming._header import Stored
from rewriter.streaming._layout import Output, Work
from rewriter.streaming._sites import Sources, check_stored
from rewriter.streaming._table import HeaderTable, refuse_modules

Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class CheckpointPlan:
    """What a spec does to a checkpoint; nothing but headers was read.

    Arguments:
        checkpoint: the files.
        plan: which rule owns which tensors.
        groups: what is stored of each tensor, by its first name.
    """

    checkpoint: Checkpoint
    plan: Plan
    groups: dict[str, Group]

    @property
    def sources(self) -> Sources:
        """Where values come from."""
        pairs = {entry.name: pair for pair in self.plan.new for entry in pair[0].entries}
        return Sources(self.groups, pairs, {name: entry for entry in self.plan.entries for name in entry.names})

    def stored_of(self, pair: Pair) -> list[Stored]:
        """Return what the checkpoint stores of a site's tensors."""
        groups = [self.groups[entry.name] for entry in pair[0].entries if entry.name in self.groups]
        return [stored for group in groups for stored in group.state.values()]

    def is_rewritten(self, pair: Pair) -> bool:
        """Whether the checkpoint has what the chain starts from, and not its value."""
        group = self.groups.get(pair[0].name)
        return group is not None and not group.plain

    def baked(self) -> list[Work]:
        """Return the work that gives plain tensors.

        Raises:
            PlanError: the checkpoint has computed tensors that no rule owns, or a rule decides over all its tensors.
        """
        self._refuse_together()
        owned = {entry.name for pair in self.plan.new for entry in pair[0].entries}
        left = [name for name, group in self.groups.items() if not group.plain and name not in owned]
        if left:
            raise PlanError(f"no rule of the spec owns {', '.join(left[:8])}, which the checkpoint stores for a chain")
        sources = self.sources
        return [self._baked(pair, sources) for pair in self._ordered()]

    def _baked(self, pair: Pair, sources: Sources) -> Work:
        claim, site = pair
        forms = [(entry.infos[0].shape, _tensor(entry).dtype) for entry in claim.entries]
        if claim.rule.unsafe:
            forms = _forms_of_values(site, [_tensor(sources.entries[name]) for name in site.spec.reads])
        outputs = [Output(e.name, dtype, shape) for e, (shape, dtype) in zip(claim.entries, forms, strict=True)]
        tied = {name: entry.name for entry in claim.entries for name in entry.names[1:]}
        inputs = sources.inputs_of(pair)
        return Work(
            claim.name, self.stored_of(pair), inputs, outputs, lambda: ([value] for value in sources.values(pair)), tied
        )

    def rewritten(self) -> list[Work]:
        """Return the work that gives stored tensors; what is stored for a chain already stays as it is.

        Raises:
            PlanError: a rule decides over all its tensors at once.
        """
        self._refuse_together()
        sources = self.sources
        return [self._rewritten(pair, sources) for pair in self._ordered() if not self.is_rewritten(pair)]

    def _rewritten(self, pair: Pair, sources: Sources) -> Work:
        claim, site = pair
        prefix, form = path_for(claim.name), stored_form(site)
        outputs = [Output(f"{prefix}.{part}", dtype, shape) for part, (shape, dtype) in form.items()]
        tied = {
            f"{path_for(other)}.{part}": f"{prefix}.{part}" for other in claim.entries[0].names[1:] for part in form
        }

        def run() -> list[list[Tensor]]:
            state = sources.site(pair).state_dict()
            if state.keys() != form.keys():
                raise NumericError(f"{claim.name}: stored are {sorted(state)}, and planned were {sorted(form)}")
            return [[value] for value in state.values()]

        records: dict[str, dict[str, object]] = {
            CHAINS: {prefix: identity(site.spec)},
            FORMS: {claim.name: [_described(entry) for entry in claim.entries]},
        }
        return Work(claim.name, self.stored_of(pair), sources.inputs_of(pair), outputs, run, tied, records)

    def _refuse_together(self) -> None:
        for rule in {id(claim.rule): claim.rule for claim, _ in self.plan.new}.values():
            _refuse_together(
                rule, [pair for pair in self.plan.new if pair[0].rule is rule and not self.is_rewritten(pair)]
            )

    def _ordered(self) -> list[Pair]:
        return list(self.plan.new[::-1])


def plan_checkpoint(path: Path, spec: Spec, model: Factory | None = None) -> CheckpointPlan:
    """Plan from headers alone: names, shapes and dtypes.

    Arguments:
        path: a safetensors file, a shard index, or a folder.
        spec: the rules.
        model: makes the model, for selectors that ask for its modules; called on the meta device.

    Raises:
        ModelFileError: a file is damaged, or stores something else than the chains compute from.
        PlanError: the spec does not fit.
    """
    return planned(open_checkpoint(path), spec, model)


def planned(checkpoint: Checkpoint, spec: Spec, model: Factory | None = None) -> CheckpointPlan:
    """Plan as `plan_checkpoint` does, for a checkpoint that was opened."""
    groups = groups_of(checkpoint)
    formal = _formal(spec)
    with nothing_drawn():
        plan = make_plan(_table(checkpoint, groups, formal, model), formal)
    rules = {rule.name: rule for rule in spec.rules}
    for claim, _ in plan.new:
        claim.rule = rules[claim.rule.name]
    made = CheckpointPlan(checkpoint, dataclasses.replace(plan, spec=spec), groups)
    _check_sites(made)
    return made


def plain_entries(path: Path, spec: Spec, model: Factory | None = None) -> list[Entry]:
    """Return the plain tensors that a checkpoint stands for, without values.

    Arguments, Raises: as for `plan_checkpoint`; which rule owns which tensor is not decided.
    """
    checkpoint = open_checkpoint(path)
    return list(_table(checkpoint, groups_of(checkpoint), _formal(spec), model).entries)


def _table(checkpoint: Checkpoint, groups: dict[str, Group], spec: Spec, model: Factory | None) -> TensorTable:
    if model is None:
        refuse_modules(spec)
        return HeaderTable(entries_of(checkpoint, groups, spec))
    table = ModuleTable(_on_meta(model), "module")
    _check_model(checkpoint, table.entries, groups)
    return table


def _check_sites(made: CheckpointPlan) -> None:
    """Refuse stored tensors that are not what the planned chains start from."""
    chains = made.checkpoint.recorded(CHAINS)
    for pair in made.plan.new:
        claim, site = pair
        if not made.is_rewritten(pair):
            continue
        problem = difference(claim.name, site.spec, {KEY: chains.get(path_for(claim.name))})
        if problem:
            raise PlanError(problem)
        check_stored(pair, made.groups[claim.name], stored_form(site))


def _formal(spec: Spec) -> Spec:
    """Return the spec for tensors without values: they have the form that a drawn value has."""
    rules = (rule.model_copy(update={"init": "keep"}) if rule.init == "sample" else rule for rule in spec.rules)
    return spec.model_copy(update={"rules": tuple(rules)})


def _on_meta(factory: Factory) -> nn.Module:
    with torch.device("meta"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ModelFileError(f"the model factory made {kind_of(model)}, not a torch.nn.Module")
    return model


def _check_model(checkpoint: Checkpoint, entries: Sequence[Entry], groups: dict[str, Group]) -> None:
    """Use the model's first names, and refuse a model that does not have the checkpoint's tensors."""
    known = {name: entry for entry in entries for name in entry.names}
    for name, group in list(groups.items()):
        entry = next((known[one] for one in group.names if one in known), None)
        if entry is None:
            raise ModelFileError(f"{checkpoint.path} has {name!r}, and the model has no such tensor")
        shape = tuple(_tensor(entry).shape)
        if group.plain and group.state[""].shape != shape:
            raise ModelFileError(f"{name!r} is {list(group.state[''].shape)}, and the model has {list(shape)}")
        del groups[name]
        groups[entry.name] = group
        if group.plain:
            entry.tensor = _tensor(entry).to(group.state[""].dtype)


def _tensor(entry: Entry) -> Tensor:
    assert entry.tensor is not None
    return entry.tensor


@torch.no_grad()
def _forms_of_values(site: Site, inputs: Sequence[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    value: Any = site.settled().evaluate(*inputs)
    values = [value] if len(site.spec.members) == 1 else value
    return [(tuple(one.shape), one.dtype) for one in values]


def _refuse_together(rule: Rule, built: Sequence[Pair]) -> None:
    """Refuse a rule that decides over all the tensors from which its sites are built."""
    count = len(built)
    together = [
        str(step)
        for step in rule.chain
        if hasattr(step.factory, "plan_sites") and not getattr(step.factory, "one_by_one", False)
    ]
    if count > 1 and (together or rule.share):
        what = f"{together[0]} chooses over all of them" if together else "`share` gives all of them one instance"
        raise PlanError.of(
            [
                rule.where("chain" if together else "share").diagnose(
                    f"rule {rule.name!r} owns {count} tensors, and {what}: they would have to be in memory together",
                    "rewrite the model in memory: reparam apply spec.yaml model.pt",
                )
            ]
        )


def _described(entry: Entry) -> dict[str, Any]:
    tensor = _tensor(entry)
    return {"names": list(entry.names), "shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
