"""``reparam validate``: check a spec on its own."""

from __future__ import annotations

from rewriter.cli._app import app
from rewriter.cli._inputs import read_spec
from rewriter.cli._options import AllowImport, Debug, Json, SpecFile
from rewriter.cli._outcome import Outcome


@app.command()
def validate(spec: SpecFile, allow_import: AllowImport = None, json: Json = False, debug: Debug = False) -> Outcome:
    """Check SPEC without a model; every problem is listed with its line and column."""
    read = read_spec(spec, allow_import)
    rules = [{"name": rule.name, "chain": [str(step) for step in rule.chain]} for rule in read.rules]
    count = "1 rule" if len(rules) == 1 else f"{len(rules)} rules"
    return Outcome({"spec": str(spec), "valid": True, "rules": rules}, f"{spec}: {count}, no problem")
