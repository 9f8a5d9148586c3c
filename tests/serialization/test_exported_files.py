"""``.pt2`` files: torch.export.load evaluates much of what is in one, so all of that is vetted first."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import pytest
import torch
from torch import nn

from rewriter.errors import ModelFileError
from rewriter.io import load_model, save_model


class Dynamic(nn.Module):
    def forward(self, x):
        return x.sum(0) * x.shape[0], torch.cat([x, x])[: x.shape[0]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Dynamic(), (torch.randn(4, 3),), dynamic_shapes={"x": {0: batch}})
    save_model(program, path)
    return path


def _edited(source, target, edit, extra=()):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("models/model.json"):
                content = json.dumps(edit(json.loads(content))).encode()
            new.writestr(entry.filename, dict(extra).get(entry.filename.partition("/")[2], content))
    return target


def test_an_exported_program_comes_back(exported):
    program = load_model(exported)
    x = torch.randn(5, 3)
    for got, expected in zip(program.module()(x), Dynamic()(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "target", ["torch.hub.load", "torch.load", "torch.serialization.os.system", "math.__loader__.load_module",
               "_operator.methodcaller", "torch.ops.aten.from_file.default", "#extension:op"],
)  # fmt: skip
def test_a_graph_that_calls_anything_else_is_refused(exported, tmp_path, target):
    def edit(model):
        model["graph_module"]["graph"]["nodes"][0]["target"] = target
        return model

    with pytest.raises(ModelFileError, match="more than torch's tensor functions") as refused:
        load_model(_edited(exported, tmp_path / "evil.pt2", edit))
    assert target in str(refused.value)


@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('true')", "().__class__", "Max('__import__(\"os\")', 1)", "lambda: 0",
     "s0.args",
     "sympify(1)",
     "Symbol('__import__(1)')", "[x for x in s0]", "L['x'].__class__", "s0; s1", "", 3],
)  # fmt: skip
def test_a_size_expression_that_is_more_than_arithmetic_is_refused(exported, tmp_path, text):
    def edit(model):
        def walk(value):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if key == "expr_str":
                    value[key] = text
                elif isinstance(item, (dict, list)):
                    walk(item)

        walk(model)
        return model

    with pytest.raises(ModelFileError, match="the size expression"):
        load_model(_edited(exported, tmp_path / "evil.pt2", edit))


def test_a_guard_that_is_more_than_arithmetic_is_refused(exported, tmp_path):
    def edit(model):
        model["guards_code"] = ["print(1)"]
        return model

    with pytest.raises(ModelFileError, match="the size expression"):
        load_model(_edited(exported, tmp_path / "evil.pt2", edit))


def test_pickled_objects_inside_are_refused(exported, tmp_path, user):
    for content in (pickle.dumps(user.Bomb()), _saved(user.Bomb())):
        extra = [("data/sample_inputs/model.pt", content)]
        with pytest.raises(ModelFileError, match=r"pickled object|their_nets\.fire"):
            load_model(_edited(exported, tmp_path / "evil.pt2", lambda model: model, extra))
    assert user.fired == []


def _saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
