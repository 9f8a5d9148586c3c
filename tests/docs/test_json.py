"""docs/json-1.schema.json describes what each command prints with `--json`, and docs/json.md lists the keys."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rewriter.cli import main

jsonschema = pytest.importorskip("jsonschema")

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "json-1.schema.json").read_text())
COMMANDS = {
    "validate": "validate spec.yaml",
    "plan": "plan spec.yaml model.pt",
    "apply": "apply spec.yaml model.pt -o again.pt",
    "bake": "bake new.pt -o plain.pt",
    "inspect": "inspect new.pt",
    "explain": "explain spec.yaml model.pt 0.weight",
    "diff": "diff model.pt new.pt",
    "report": "report model.pt new.pt -o out.html",
    "draw": "draw new.pt -o graph.svg",
    "catalog": "catalog",
    "catalog NAME": "catalog orthogonal",
    "recipes": "recipes",
    "recipes NAME": "recipes spectral_gan",
    "init": "init model.pt --for orthogonal",
    "error": "validate wrong.yaml",
}


def output(capsys: pytest.CaptureFixture[str], line: str) -> Any:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*line.split(), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    spec = "reparam: 1\nrules:\n  - {name: even, select: '*.weight', chain: [symmetric]}\n"
    Path("spec.yaml").write_text(spec)
    Path("wrong.yaml").write_text(spec.replace("symmetric", "symetric"))
    torch.save(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "model.pt")
    output(capsys, "apply spec.yaml model.pt -o new.pt")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", COMMANDS)
def test_documents_are_as_described(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = output(capsys, COMMANDS[name])
    jsonschema.validate(document, {**SCHEMA, "$ref": f"#/$defs/{name.replace(' ', '%20')}"})
    described = SCHEMA["$defs"][name]["properties"]
    assert document.keys() <= described.keys()


def test_the_page_lists_the_keys_of_each_command() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", (DOCS / "json.md").read_text(), re.M))
    for name, row in rows.items():
        wanted = set(SCHEMA["$defs"][name]["properties"]) - {"version"}
        listed = set(re.findall(r"`(\w+)`", row))
        assert wanted <= listed | (set(SCHEMA["$defs"]["plan"]["properties"]) if name == "apply" else set())
    assert rows.keys() == {name for name in SCHEMA["$defs"] if name.islower()} - {"error"}
