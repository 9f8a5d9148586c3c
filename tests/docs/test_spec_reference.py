"""docs/spec.md has an entry for every key of the schema, with its default and an example that loads."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import nn

from rewriter import load_spec
from rewriter.language import json_schema
from rewriter.language._read import read

PAGE = (Path(__file__).parents[2] / "docs" / "spec.md").read_text()


class Entry(NamedTuple):
    """One key of the page: its section, its text and its example."""

    section: str
    key: str
    text: str
    example: str


def entries() -> list[Entry]:
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.M)[1:]:
        title, _, body = section.partition("\n")
        for part in re.split(r"^### `", body, flags=re.M)[1:]:
            key, _, rest = part.partition("`\n")
            text, _, example = rest.partition("```yaml\n")
            found.append(Entry(title, key, " ".join(text.split()), example.partition("```")[0]))
    return found


def described() -> dict[tuple[str, str], dict[str, Any]]:
    """Every key of the schema, by the page's section."""
    schema = json_schema()
    forms = schema["$defs"]
    sections = {
        "A spec": schema,
        "A rule": forms["Rule"],
        "A selector": forms["Predicates"],
        "A step": forms["StepKeys"],
        "Chunks": forms["Per"],
    }
    return {(name, key): value for name, form in sections.items() for key, value in form["properties"].items()}


def test_page_has_the_keys_of_the_schema() -> None:
    assert [(entry.section, entry.key) for entry in entries()] == list(described())


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: f"{entry.section}: {entry.key}")
def test_entry_states_default_and_requirement(entry: Entry) -> None:
    schema = described()[entry.section, entry.key]
    default = schema.get("default")
    written = {False: "false", True: "true"}.get(default, str(default)) if isinstance(default, (bool, str)) else default
    shown = re.findall(r"Default `([^`]*)`", entry.text)
    assert shown == ([] if default is None else [str(written)])
    required = {"A spec": {"reparam"}, "A rule": {"name", "select", "chain"}}
    assert ("Required" in entry.text) == (entry.key in required.get(entry.section, set()))


@pytest.fixture
def my_pkg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that the page's examples import."""
    module = type(sys)("my_pkg.constraints")
    package = type(sys)("my_pkg")
    package.__path__ = []  # type: ignore[attr-defined]

    class Scale(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()

    class Fold(nn.Module):
        pass

    for kind in (Scale, Fold):
        kind.__module__ = module.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "my_pkg", package)
    monkeypatch.setitem(sys.modules, "my_pkg.constraints", module)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: f"{entry.section}: {entry.key}")
def test_example_of_an_entry_loads(entry: Entry, my_pkg: None) -> None:
    written = read(f"example:\n{re.sub('^', '  ', entry.example, flags=re.M)}\n").data["example"]
    assert re.search(rf"\b{entry.key}\b", entry.example)
    if entry.section == "A spec":
        spec = written if "rules" in written else {**written, "rules": []}
    else:
        rule: dict[str, Any] = {"name": "example", "select": "**.weight", "chain": ["symmetric"]}
        rule |= {"A selector": {"select": written}, "A step": {"chain": written}}.get(entry.section, written)
        rules = [rule, *({"name": name, "select": "*", "chain": ["skew"]} for name in rule.get("overrides", ()))]
        spec = {"reparam": 1, "imports": {"my": "my_pkg.constraints"}, "rules": rules}
    assert load_spec(spec).rules is not None


def test_the_first_example_loads(my_pkg: None) -> None:
    text = PAGE.partition("```yaml\n")[2].partition("```")[0]
    assert [rule.name for rule in load_spec(text).rules] == ["recurrent-kernel", "attention"]
