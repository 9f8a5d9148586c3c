"""The JSON Schema by which editors check and explain a spec while it is written."""

from __future__ import annotations

from typing import Any

from rewriter.language._schema import SpecForm

_UNWRITABLE: dict[str, Any] = {"not": {}}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a spec, for editors.

    >>> sorted(json_schema()["properties"])
    ['absorb', 'imports', 'reparam', 'rules']
    """
    schema: dict[str, Any] = _tidy(SpecForm.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "reparam spec", **schema}


def _tidy(schema: Any) -> Any:
    """Remove what only Pydantic needs: titles made from names, defaults that stand for an absent key."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema if item != _UNWRITABLE]
    if not isinstance(schema, dict):
        return schema
    tidy = {
        key: _tidy(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str)) and not (key == "default" and value is None)
    }
    if isinstance(tidy.get("description"), str):
        tidy["description"] = " ".join(tidy["description"].split())
    return tidy
