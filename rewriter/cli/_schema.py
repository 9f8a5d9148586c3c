"""``reparam schema``: the spec language for editors."""

from __future__ import annotations

import json as to_json

from rewriter.cli._app import app
from rewriter.cli._options import Debug, Json
from rewriter.cli._outcome import Outcome


@app.command()
def schema(json: Json = False, debug: Debug = False) -> Outcome:
    """Print the JSON Schema of specs, for editors that check and complete while one writes."""
    from rewriter.language import json_schema

    document = json_schema()
    return Outcome(document, to_json.dumps(document, indent=2, ensure_ascii=False))
