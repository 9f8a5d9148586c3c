"""Whatever is thrown at `load_spec`, only a SpecError comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewriter.errors import SpecError
from rewriter.language import Spec, load_spec

EVERY_KEY = Path(__file__).with_name("every_key.yaml").read_text()
PLAIN: dict[str, Any] = yaml.safe_load(EVERY_KEY)
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

KEYS = st.sampled_from(
    "reparam imports absorb rules name select except expect overrides chain cache init share unsafe per reshape "
    "from joint batch memory path regex module tensor kind ndim shape dtype requires_grad dim chunks label inputs "
    "orthogonal map my my.Scale factor".split()
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    KEYS,
    st.sampled_from("* ** {a a.b >=3 1.. ( cayley forward my_pkg.constraints out torch.f".split()),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=20
)


def load(source: Any) -> None:
    try:
        spec = load_spec(source)
    except SpecError as refused:
        assert refused.diagnostics and str(refused)
        return
    assert isinstance(spec, Spec) and load_spec(spec.to_dict()) == spec


@FEW
@given(st.binary(max_size=200))
def test_random_bytes(tmp_path_factory: Any, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_bytes(raw)
    load(path)


@FEW
@given(st.text(max_size=200))
def test_random_text(text: str) -> None:
    load(text + "\n")


@FEW
@given(st.text("ab:-[]{},&*!|>'\"#%@`?~ \n\t01.<", max_size=40))
def test_random_punctuation(text: str) -> None:
    load(text + "\n")


@FEW
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_random_mappings(value: dict[str, Any]) -> None:
    load({"reparam": 1, **value})


@FEW
@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=6), max_size=3))
def test_random_rules(rules: list[dict[str, Any]]) -> None:
    plain = [{"name": f"r{i}", "select": "x", "chain": ["orthogonal"], **rule} for i, rule in enumerate(rules)]
    load({"reparam": 1, "rules": plain})
    load(json.dumps({"reparam": 1, "rules": plain}) + "\n")


@FEW
@given(st.data())
def test_a_spec_with_one_value_replaced(data: st.DataObject) -> None:
    spec = json.loads(json.dumps(PLAIN))
    place: Any = spec
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(VALUES)
    load(spec)


@FEW
@given(st.integers(0, len(EVERY_KEY)), st.integers(0, 10), st.text(max_size=5))
def test_a_spec_with_some_characters_replaced(at: int, removed: int, inserted: str) -> None:
    load(EVERY_KEY[:at] + inserted + EVERY_KEY[at + removed :])
