"""Any source either loads or is a SpecError, and what loads can be written out and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewriter.errors import SpecError
from rewriter.language import Spec, json_schema, load_spec

EVERY_KEY = Path(__file__).with_name("every_key.yaml").read_text()
FEW = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
WORDS = st.sampled_from(
    "a b a.weight **.weight * {a,b} {a a..b ( >=3 1.. 3..8 out weight bias Linear torch.nn.Linear float32 half "
    "orthogonal symmetric torch.Orthogonal my.Scale ortogonal q <text> [key]".split()
) | st.text(max_size=8)
ARGUMENTS = st.dictionaries(
    st.sampled_from(["map", "dim", "eps", "label", "inputs"]), st.sampled_from(["cayley", 0, 1e-3, 0.5, "a", ["a"]])
)


def drawn_from(schema: dict[str, Any], models: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return what fits a JSON Schema; texts are drawn from `WORDS`, or are wrong in a way that no schema says."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return ARGUMENTS if name == "StepKeys" else drawn_from(models[name], models)
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    if "oneOf" in schema or "anyOf" in schema:
        return st.one_of([drawn_from(choice, models) for choice in schema.get("oneOf") or schema["anyOf"]])
    match schema["type"]:
        case "array":
            return st.lists(drawn_from(schema["items"], models), min_size=schema.get("minItems", 0), max_size=3)
        case "object" if "properties" in schema:
            keys = {key: drawn_from(value, models) for key, value in schema["properties"].items()}
            needed = {key: keys.pop(key) for key in schema.get("required", ())}
            return st.fixed_dictionaries(needed, optional=keys)
        case "object":
            values = schema.get("additionalProperties") or next(iter(schema["patternProperties"].values()))
            least, most = schema.get("minProperties", 0), schema.get("maxProperties", 2)
            return st.dictionaries(WORDS, drawn_from(values, models), min_size=least, max_size=most)
    return {"string": WORDS, "integer": st.integers(-2, 4), "boolean": st.booleans(), "null": st.none()}[schema["type"]]


SPECS = drawn_from(json_schema(), json_schema()["$defs"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=20,
)


def loads(source: Any) -> bool:
    try:
        spec = load_spec(source)
    except SpecError as refused:
        assert refused.diagnostics and str(refused)
        return False
    assert isinstance(spec, Spec) and load_spec(spec.to_dict()) == spec
    return True


def test_a_mapping_that_fits_the_schema_loads_or_is_refused() -> None:
    outcomes = set()

    @FEW
    @given(SPECS)
    def draw(spec: dict[str, Any]) -> None:
        outcomes.add(loads(spec))
        loads(json.dumps(spec) + "\n")

    draw()
    assert outcomes == {True, False}


@FEW
@given(SPECS, st.data())
def test_a_spec_with_one_value_replaced(spec: dict[str, Any], data: st.DataObject) -> None:
    place: Any = spec
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(VALUES)
    loads(spec)


@FEW
@given(st.dictionaries(st.sampled_from(["reparam", "rules", "imports", "absorb", "rule"]), VALUES))
def test_random_mappings(value: dict[str, Any]) -> None:
    loads({"reparam": 1, **value})


@FEW
@given(st.binary(max_size=200))
def test_random_bytes(tmp_path_factory: Any, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_bytes(raw)
    loads(path)


@FEW
@given(st.text(max_size=200) | st.text("ab:-[]{},&*!|>'\"#%@`?~ \n\t01.<", max_size=40))
def test_random_text(text: str) -> None:
    loads(text + "\n")


@FEW
@given(st.integers(0, len(EVERY_KEY)), st.integers(0, 10), st.text(max_size=5))
def test_a_spec_with_some_characters_replaced(at: int, removed: int, inserted: str) -> None:
    loads(EVERY_KEY[:at] + inserted + EVERY_KEY[at + removed :])
