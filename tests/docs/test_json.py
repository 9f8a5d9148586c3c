"""docs/json-1.schema.json describes what each command prints with `--json`, and docs/json.md lists the keys."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rewriter.cli import main

jsonschema = pytest.importorskip("jsonschema")

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "json-1.schema.json").read_text())
SIDES = {"A": (2, 4), "B": (4, 2)}
COMMANDS = {
    "validate": "validate spec.yaml",
    "plan": "plan spec.yaml model.pt",
    "apply": "apply spec.yaml model.pt -o again.pt",
    "bake": "bake new.pt -o plain.pt",
    "apply CHECKPOINT": "apply spec.yaml weights.safetensors -o chains.safetensors",
    "bake CHECKPOINT": "bake weights.safetensors --spec spec.yaml -o baked.safetensors",
    "merge": "merge weights.safetensors adapter -o merged.safetensors",
    "demo": "demo --out demo --seconds 1",
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
    save_file({"0.weight": torch.ones(4, 4), "1.weight": torch.ones(4, 4)}, "weights.safetensors")
    Path("adapter").mkdir()
    lora = {f"base_model.model.0.lora_{side}.weight": torch.ones(shape) for side, shape in SIDES.items()}
    save_file(lora, "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"]}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    output(capsys, "apply spec.yaml model.pt -o new.pt")


def closed(schema: Any) -> Any:
    """Return a schema whose objects have no other keys than those that it describes."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {name: closed(part) for name, part in schema.items()}
    return {"additionalProperties": False, **parts} if isinstance(schema.get("properties"), dict) else parts


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "demo" else []) for name in COMMANDS]
)
def test_documents_are_as_described(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = output(capsys, COMMANDS[name])
    jsonschema.validate(document, {**closed(SCHEMA), "$ref": f"#/$defs/{name.replace(' ', '%20')}"})


def test_every_document_has_a_command_that_prints_it() -> None:
    assert COMMANDS.keys() | {"SITE"} == SCHEMA["$defs"].keys()


def test_the_page_lists_the_keys_of_each_command() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", (DOCS / "json.md").read_text(), re.M))
    for name, row in rows.items():
        wanted = set(SCHEMA["$defs"][name]["properties"]) - {"version"}
        listed = set(re.findall(r"`(\w+)`", row))
        assert wanted <= listed | (set(SCHEMA["$defs"]["plan"]["properties"]) if name == "apply" else set())
    assert rows.keys() == {name for name in SCHEMA["$defs"] if name.islower()} - {"error"}
