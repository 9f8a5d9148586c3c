"""``.pt2`` files: torch's reader runs code of the file, so each of them needs trust."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from torch import nn

from rewriter.errors import ModelFileError
from rewriter.io import load_model, save_model


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "model.pt2"
    save_model(torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),)), path)
    return path


def test_a_program_is_read_with_trust(exported):
    assert load_model(exported, trust=True).module()(torch.ones(4, 3)[:1]).shape == (1, 2)


@pytest.mark.parametrize("options", [{}, {"allow": ["torch.*"]}], ids=["plain", "allow"])
def test_a_program_without_trust_is_refused(exported, options):
    with pytest.raises(ModelFileError, match=r"runs code(.|\n)*--trust \(trust=True"):
        load_model(exported, **options)


def test_a_refused_program_imports_nothing(exported, tmp_path, capsys):
    crafted = tmp_path / "crafted.pt2"
    context = {"default_factory_module": "this", "default_factory_name": "c", "dict_context": []}
    spec = [1, {"type": "collections.defaultdict", "context": context, "children_spec": []}]
    with zipfile.ZipFile(exported) as source, zipfile.ZipFile(crafted, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("models/model.json"):
                model = json.loads(content)
                model["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(spec)
                content = json.dumps(model).encode()
            target.writestr(entry, content)
    with pytest.raises(ModelFileError, match="--trust"):
        load_model(crafted)
    assert "Zen of Python" not in capsys.readouterr().out


def test_a_damaged_program_gives_a_message_with_trust(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("x/archive_format", "pt2")
    with pytest.raises(ModelFileError, match="cannot be read as an ExportedProgram"):
        load_model(tmp_path / "model.pt2", trust=True)
