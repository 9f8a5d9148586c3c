"""``reparam schema``: the spec language for editors."""

from __future__ import annotations

import json as to_json

from rewriter.cli._app import command
from rewriter.cli._outcome import Outcome


@command("reparam schema > reparam.schema.json")
def schema() -> Outcome:
    """Print the JSON Schema of specs, for editors that check and complete."""
    from rewriter.language import json_schema

    document = json_schema()
    return Outcome(document, to_json.dumps(document, indent=2, ensure_ascii=False))
