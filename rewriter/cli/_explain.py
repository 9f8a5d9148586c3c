"""``reparam explain``: why each rule does or does not own a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli._app import command
from rewriter.cli._complete import tensor_names
from rewriter.cli._inputs import streamed
from rewriter.cli._models import entries_of
from rewriter.cli._options import ModelFile, ModelOptions, SpecFile, SpecOptions
from rewriter.cli._outcome import Outcome
from rewriter.cli._streaming import entries as entries_of_checkpoint
from rewriter.errors import PlanError

if TYPE_CHECKING:
    from rewriter.language import Rule, Selector
    from rewriter.planning import Entry


@command("reparam explain spec.yaml model.pt 0.weight")
def explain(
    spec: SpecFile,
    model_file: ModelFile,
    tensor: Annotated[
        str,
        typer.Argument(metavar="TENSOR", help="The full name of a parameter or buffer.", autocompletion=tensor_names),
    ],
    spec_options: SpecOptions,
    model_options: ModelOptions,
) -> Outcome:
    """Say for each rule of SPEC why it does or does not own TENSOR of MODEL.

    MODEL can also be a folder of shards, an index or a safetensors file, of which only the headers are read.
    """
    from torch import nn

    from rewriter.absorbing import foreign_entries, holders_of
    from rewriter.parametrizations._registry import suggestion

    read = spec_options.read(spec)
    held: list[tuple[Entry, str]] = []
    if streamed(model_file, model_options.model is None):
        entries = entries_of_checkpoint(model_file, model_options, read)
    else:
        loaded = model_options.read_for(read, model_file)
        held = list(foreign_entries(loaded, holders_of(loaded))) if isinstance(loaded, nn.Module) else []
        entries = [*(entry for entry, _ in held), *entries_of(loaded)]
    found = next((entry for entry in entries if tensor in entry.names), None)
    if found is None:
        near = suggestion(tensor, [name for entry in entries for name in entry.names])
        raise PlanError(f"{model_file} has no tensor {tensor!r}{near}")
    members = [entry for entry in entries if _shares_owner(entry, found)]
    claimed = {rule.name for rule in read.rules if _claims(rule, found, members)}
    beaten = {name: rule.name for rule in read.rules if rule.name in claimed for name in rule.overrides}
    verdicts = [_verdict(rule, found, claimed, beaten) for rule in read.rules]
    owners = [verdict["rule"] for verdict in verdicts if verdict["owns"]]
    source = next((source for entry, source in held if entry is found), None)
    document = {
        "tensor": tensor,
        "names": list(found.names),
        "owners": owners,
        "computed_by": source,
        "rules": verdicts,
    }
    summary = _summary(owners) if source is None else _summary_of_held(source, owners, read.absorb)
    lines = [f"{' = '.join(found.names)}: {summary}", ""]
    lines += [
        f"{'✓' if verdict['owns'] else '·'} {verdict['rule']} ({verdict['where']}): {verdict['why']}"
        for verdict in verdicts
    ]
    return Outcome(document, "\n".join(lines))


def _summary(owners: list[str]) -> str:
    if not owners:
        return "no rule owns it"
    if len(owners) > 1:
        return f"an error: {' and '.join(owners)} both own it, and neither names the other in `overrides`"
    return f"owned by {owners[0]}"


def _summary_of_held(source: str, owners: list[str], absorb: bool) -> str:
    if owners:
        return f"an error: it is computed already, by {source}, and {' and '.join(owners)} would own it"
    taken = "the spec takes it over" if absorb else "`absorb: true` in the spec would take it over"
    return f"computed already, by {source}; {taken}"


def _verdict(rule: Rule, entry: Entry, claimed: set[str], beaten: dict[str, str]) -> dict[str, Any]:
    claims = rule.name in claimed
    owns = claims and rule.name not in beaten
    return {"rule": rule.name, "where": str(rule.location), "owns": owns, "why": _why(rule, entry, claims, beaten)}


def _why(rule: Rule, entry: Entry, claims: bool, beaten: dict[str, str]) -> str:
    from rewriter.planning import gates_hint

    selected, excluded = _matching(rule.select, entry), _matching(rule.exclude, entry)
    if claims and rule.name in beaten:
        return f"select {selected or rule.select} matches, and rule {beaten[rule.name]!r} overrides it"
    if claims and selected is None:
        return f"it belongs to {', '.join(rule.joint)} of a module that select {rule.select} matches"
    if claims:
        chain = [str(step) for step in rule.chain]
        plain = rule.per is None and rule.reshape is None
        hint = gates_hint(entry.name, entry.infos[0].shape, chain) if plain else ""
        becomes = " >> ".join(chain) or "nothing (it is left alone)"
        return f"select {selected} matches; it becomes {becomes}" + (f". {hint}" if hint else "")
    if selected is None:
        return f"select {rule.select} does not match"
    return f"select {selected} matches, and except {excluded} takes it out"


def _claims(rule: Rule, entry: Entry, members: list[Entry]) -> bool:
    if rule.joint:
        return entry.infos[0].tensor in rule.joint and any(_selects(rule, member) for member in members)
    return _selects(rule, entry)


def _selects(rule: Rule, entry: Entry) -> bool:
    return _matching(rule.select, entry) is not None and _matching(rule.exclude, entry) is None


def _matching(selector: Selector | None, entry: Entry) -> str | None:
    if selector is None:
        return None
    matches = (str(one) for one in selector.alternatives if any(map(one.matches, entry.infos)))
    return next(matches, None)


def _shares_owner(one: Entry, other: Entry) -> bool:
    return bool({info.owner for info in one.infos} & {info.owner for info in other.infos})
