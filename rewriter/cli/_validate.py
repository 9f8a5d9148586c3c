"""``reparam validate``: check a spec without a model."""

from __future__ import annotations

from rewriter.cli._app import command
from rewriter.cli._options import SpecFile, SpecOptions
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import counted


@command("reparam validate spec.yaml")
def validate(spec: SpecFile, spec_options: SpecOptions) -> Outcome:
    """Check SPEC without a model; list every problem with its line and column."""
    read = spec_options.read(spec)
    rules = [{"name": rule.name, "chain": [str(step) for step in rule.chain]} for rule in read.rules]
    return Outcome(
        {"spec": str(spec), "valid": True, "rules": rules}, f"{spec}: {counted(len(rules), 'rule')}, no problem"
    )
