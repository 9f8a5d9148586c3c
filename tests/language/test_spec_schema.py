from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rewriter.language import json_schema, reference

EVERY_KEY = Path(__file__).with_name("every_key.yaml")


def test_the_schema_is_valid_and_accepts_the_spec_with_every_key() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(EVERY_KEY.read_text()), schema)


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"cache": "sometimes"},
        {"selct": "x"},
        {"chain": [3]},
        {"chain": [{"a": {}, "b": {}}]},
        {"chain": [{"a": {"inputs": "x"}}]},
        {"select": {"kind": "both"}},
        {"per": {"dim": 0}},
        {"joint": ["weight"]},
        {"except": []},
    ],
)
def test_the_schema_refuses_what_loading_refuses(change: dict[str, Any]) -> None:
    spec = {"reparam": 1, "rules": [{"name": "a", "select": "x", "chain": ["orthogonal"]} | change]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, json_schema())


def test_the_reference_has_a_row_for_every_key() -> None:
    rows = reference().splitlines()
    schema = json_schema()
    for form in [schema, *schema["$defs"].values()]:
        for key, value in form["properties"].items():
            description = " ".join(value["description"].split())
            assert any(row.startswith(f"| `{key}` | ") and row.endswith(f" | {description} |") for row in rows)
    cells = {row.split(" | ")[0]: row.split(" | ")[1:3] for row in rows}
    assert cells["| `cache`"] == ["'forward', 'never' or 'version'", "`forward`"]
    assert cells["| `chunks`"] == ["a whole number", "required"]
    assert cells["| `overrides`"] == ["a list of text", ""]


def test_every_key_is_described() -> None:
    schema = json_schema()
    forms = [schema, *schema["$defs"].values()]
    assert len(forms) == 5
    for form in forms:
        assert form["additionalProperties"] is (form is schema["$defs"]["StepKeys"])
        for name, key in form["properties"].items():
            assert key.get("description"), name
