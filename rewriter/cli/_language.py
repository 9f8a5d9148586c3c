"""The commands about the spec language itself: ``validate``, ``schema`` and ``catalog``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from rewriter.cli._app import command
from rewriter.cli._complete import catalog_names
from rewriter.cli._console import step
from rewriter.cli._options import SpecFile, SpecOptions
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import counted, table
from rewriter.errors import RewriterError

if TYPE_CHECKING:
    from rewriter.parametrizations import Entry


@command("reparam validate spec.yaml")
def validate(spec: SpecFile, spec_options: SpecOptions) -> Outcome:
    """Check SPEC without a model; list every problem with its line and column."""
    read = spec_options.read(spec)
    rules = [{"name": rule.name, "chain": [str(step) for step in rule.chain]} for rule in read.rules]
    text = f"{spec}: {counted(len(rules), 'rule')}, no problem"
    return Outcome({"spec": str(spec), "valid": True, "rules": rules}, text)


@command("reparam schema > reparam.schema.json")
def schema() -> Outcome:
    """Print the JSON Schema of specs, for editors that check and complete."""
    from rewriter.language import json_schema

    document = json_schema()
    return Outcome(document, json.dumps(document, indent=2, ensure_ascii=False))


@command("reparam catalog", "reparam catalog orthogonal")
def catalog(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="The one to describe.", show_default=False, autocompletion=catalog_names),
    ] = None,
) -> Outcome:
    """List the parametrizations that specs can name, or describe one."""
    with step("loading torch"):
        from rewriter.parametrizations import _registry, describe

    try:
        if name is not None:
            entry = describe(name)
            return Outcome(asdict(entry), _described(entry))
        entries = [describe(known) for known in _registry.names()]
    except LookupError as unknown:
        raise RewriterError(str(unknown.args[0] if unknown.args else unknown)) from unknown
    listed = table(("name", "what it does"), [(entry.name, entry.summary) for entry in entries])
    return Outcome({"parametrizations": [asdict(entry) for entry in entries]}, listed)


def _described(entry: Entry) -> str:
    rows = [
        ("arguments", "\n             ".join(entry.arguments) or "none"),
        ("guarantee", entry.guarantee),
        ("inverse", "a value can be assigned" if entry.right_inverse else "none"),
        ("sample", "draws random values" if entry.sample else "none"),
        ("cost", entry.cost),
        ("paper", entry.reference),
    ]
    lines = [entry.name, "", entry.summary, "", *(f"{key:<11}  {value}" for key, value in rows if value)]
    return "\n".join([*lines, "", entry.example] if entry.example else lines)
