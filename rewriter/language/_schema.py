"""The language for editors, as JSON Schema, and for readers, as Markdown: both come from the models."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import WithDefaultSchema

from rewriter.language._spec import Spec
from rewriter.language._words import words

_SECTIONS = {"Rule": "A rule", "Predicates": "A selector", "StepKeys": "A step", "Per": "`per`"}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a spec, for editors.

    >>> sorted(json_schema()["properties"])
    ['absorb', 'imports', 'reparam', 'rules', 'trainable']
    """
    schema = Spec.model_json_schema(schema_generator=_Schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "reparam spec"}


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
        cells = [f"`{key}`", words(value, models), default, " ".join(value["description"].split())]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


class _Schema(GenerateJsonSchema):
    """No titles made from names, and no defaults of absent keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: WithDefaultSchema) -> dict[str, Any]:
        absent = schema.get("default") in (None, ())
        return self.generate_inner(schema["schema"]) if absent else super().default_schema(schema)
