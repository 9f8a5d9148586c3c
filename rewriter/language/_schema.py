"""The language for editors, as JSON Schema, and for readers, as Markdown: both come from the models."""

from __future__ import annotations

import json
from typing import Any

from rewriter.language._spec import Spec
from rewriter.language._words import words

_SECTIONS = {"Rule": "A rule", "Predicates": "A selector", "StepKeys": "A step", "Per": "`per`"}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a spec, for editors.

    >>> sorted(json_schema()["properties"])
    ['absorb', 'imports', 'reparam', 'rules']
    """
    schema: dict[str, Any] = _tidy(Spec.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "reparam spec", **schema}


def reference() -> str:
    """Return one table for each kind of mapping in a spec: keys, types, defaults, descriptions.

    >>> print(reference().splitlines()[6])
    | `absorb` | true or false | `false` | Take over what torch's own parametrize, weight_norm, spectral_norm and prune, and PEFT did to the model. |
    """  # noqa: E501
    schema = json_schema()
    models = {"A spec": schema} | {title: schema["$defs"][name] for name, title in _SECTIONS.items()}
    return "\n".join(f"## {title}\n\n{_table(model, schema['$defs'])}" for title, model in models.items())


def _table(model: dict[str, Any], models: dict[str, Any]) -> str:
    rows = ["| key | type | default | description |", "|---|---|---|---|"]
    for key, value in model["properties"].items():
        default = "required" if key in model.get("required", ()) else ""
        if "default" in value:
            written = value["default"]
            default = f"`{written if isinstance(written, str) else json.dumps(written)}`"
        cells = [f"`{key}`", words(value, models), default, value["description"]]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _tidy(schema: Any) -> Any:
    """Remove titles made from names, defaults of absent keys, and line breaks of descriptions."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tidy = {
        key: _tidy(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str)) and not (key == "default" and value in (None, []))
    }
    if isinstance(tidy.get("description"), str):
        tidy["description"] = " ".join(tidy["description"].split())
    return tidy
