"""bake and inspect on files for serving."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from rewriter.errors import RewriterError
from rewriter.export import example_call, example_tensor, export_model
from rewriter.io import load_model

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def rewritten(reparam, folder):
    result = reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt")
    assert result.code == 0, result.err
    return folder / "rewritten.pt"


@pytest.mark.slow
def test_bake_compares_the_file_and_inspect_says_where_its_weights_come_from(reparam, rewritten, folder):
    torch.save({"input": X}, folder / "sample.pt")
    result = reparam("bake", rewritten, "-o", "o.pt2", "--inputs", "sample.pt", "--dynamic", "batch=0", "--json")
    assert result.code == 0, result.err
    assert result.json["difference"] < 1e-5
    assert "read back, largest difference" in result.err
    program = load_model("o.pt2", trust=True)
    assert program.module()(input=torch.ones(7, 4)).shape[0] == 7
    found = reparam("inspect", "o.pt2", "--trust", "--json").json["provenance"]
    assert found["tensors"]["0.weight"] == {"rule": "even", "chain": ["symmetric"], "options": ""}


@pytest.mark.parametrize("name", ["o.ts", pytest.param("o.onnx", marks=pytest.mark.slow), "o.safetensors"])
def test_inspect_reads_exported_files_without_running_them(reparam, rewritten, name):
    pytest.importorskip("onnxscript") if name == "o.onnx" else None
    result = reparam("bake", rewritten, "-o", name, "--example", "float32[3,4]", "--no-verify")
    assert result.code == 0, result.err
    shown = reparam("inspect", name)
    assert shown.code == 0, shown.err
    assert "0.weight = symmetric (rule even)" in shown.out
    document = reparam("inspect", name, "--json").json
    assert {"0.weight", "0.bias"} <= {tensor["names"][0] for tensor in document["tensors"]}
    assert {(tensor["dtype"], tuple(tensor["shape"])) for tensor in document["tensors"]} >= {("float32", (4, 4))}


def test_a_file_that_is_not_the_model_gives_code_5_and_is_not_kept(reparam, rewritten, monkeypatch):
    from rewriter.export import _export

    def wrong(job, path):
        scripted = torch.jit.script(job.module)
        with torch.no_grad():
            next(iter(scripted.parameters())).add_(1)
            torch.jit.save(scripted, path)
            next(iter(scripted.parameters())).sub_(1)

    monkeypatch.setitem(_export.WRITERS, "torchscript", wrong)
    result = reparam("bake", rewritten, "-o", "o.ts", "--example", "float32[3,4]")
    assert result.code == 5
    assert not os.path.exists("o.ts")


def test_inputs_and_examples_are_read(reparam, rewritten, folder):
    torch.save(object, folder / "bad.pt")
    assert reparam("bake", rewritten, "-o", "o.pt2", "--inputs", "bad.pt").code == 6
    both = reparam("bake", rewritten, "-o", "o.pt2", "--inputs", "bad.pt", "--example", "float32[1]")
    assert (both.code, "not by both" in both.err) == (2, True)
    call = example_call(["float32[2,3]", "ids=int64[2,50]:5..9", "mask=int64[2,6]"])
    assert call.kwargs["ids"].min() == 5
    assert call.kwargs["ids"].max() == 9
    assert set(call.kwargs["mask"].unique().tolist()) == {0, 1}
    assert call.kwargs["mask"][:, 0].tolist() == [1, 1]
    with pytest.raises(Exception, match="a range is for integers"):
        example_tensor("float32[2]:0..3")
    with pytest.raises(Exception, match="int8 cannot hold"):
        example_tensor("int8[20]:0..999")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_inspect_of_torchscript_has_torchs_names_of_dtypes(reparam, folder, dtype):
    model = torch.nn.Linear(2, 2)
    model.register_buffer("extra", torch.ones(2).to(dtype))
    torch.jit.save(torch.jit.script(model), "model.ts")
    found = {row["names"][0]: row["dtype"] for row in reparam("inspect", "model.ts", "--json").json["tensors"]}
    assert found["extra"] == str(dtype).removeprefix("torch.")


TIED = """
import rewriter
from torch import nn

def rewritten():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    rules = [{"name": "even", "select": "0.weight", "chain": ["symmetric"]}]
    return rewriter.rewrite(model, {"reparam": 1, "rules": rules})
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_baked_weights_keep_the_dtypes_and_the_texts_of_their_file(reparam, folder, monkeypatch, dtype):
    safetensors = pytest.importorskip("safetensors")
    (folder / "tied_net.py").write_text(TIED)
    monkeypatch.syspath_prepend(folder)
    model = importlib.import_module("tied_net").rewritten().to(dtype)
    export_model(model, "w.safetensors", metadata={"author": "me"})
    result = reparam("bake", "w.safetensors", "--model", "tied_net:rewritten", "-o", "o.safetensors")
    assert result.code == 0, result.err
    with safetensors.safe_open("o.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        texts = file.metadata()
    assert {tensor.dtype for name, tensor in found.items() if name != "1.num_batches_tracked"} == {dtype}
    torch.testing.assert_close(found["0.weight"], model[0].weight.detach())
    assert set(texts) == {"format", "author", "2.weight", "reparam.provenance"}
    assert (texts["format"], texts["author"]) == ("pt", "me")


def test_texts_for_a_header_are_refused_where_there_is_none(tmp_path):
    with pytest.raises(RewriterError, match="metadata is for the header of a safetensors file; module has none"):
        export_model(torch.nn.Linear(2, 2), tmp_path / "o.pt", metadata={"author": "me"})
