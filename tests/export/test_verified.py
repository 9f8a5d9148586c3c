"""Exported files are read back in a new process, and compared with the model at the given size and at another one."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch import nn

import rewriter
from rewriter.errors import CaptureError, ModelFileError, NumericError, RewriterError
from rewriter.export import _export as exporting
from rewriter.export import export_model, provenance, read_provenance

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
SPEC = {"reparam": 1, "rules": [{"name": "s", "select": "*.weight", "chain": ["spectral_norm"]}]}


@dataclasses.dataclass
class Result:
    out: torch.Tensor
    nothing: torch.Tensor | None
    both: tuple[torch.Tensor, ...] | torch.Tensor


class Masked(nn.Module):
    def __init__(self, nested=True):
        super().__init__()
        self.fc, self.nested = nn.Linear(4, 2), nested

    def forward(self, x, mask, *, scale=None):
        hidden = self.fc(x) * mask
        return Result(hidden, None, (hidden.tanh(), hidden + 1) if self.nested else hidden.tanh())


def _model():
    return rewriter.bake(rewriter.rewrite(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), SPEC)).eval()


@pytest.mark.parametrize(
    "name",
    ["o.ts", "o.safetensors", *(pytest.param(name, marks=pytest.mark.slow) for name in ("o.pt2", "o.onnx", "o.pt"))],
)
@pytest.mark.filterwarnings("ignore")
def test_a_file_is_read_back_and_compared(tmp_path, name):
    pytest.importorskip("onnxruntime") if name == "o.onnx" else None
    written = export_model(_model(), tmp_path / name, example_inputs=X)
    assert written.difference is not None
    assert written.difference < 1e-5
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_a_size_that_varies_is_compared_too(tmp_path, format, monkeypatch):
    pytest.importorskip("onnxruntime") if format == "onnx" else None
    seen = []
    compare = exporting.verify_file.__globals__["_outputs_in_new_process"]
    monkeypatch.setitem(
        exporting.verify_file.__globals__,
        "_outputs_in_new_process",
        lambda format, path, calls: (
            seen.extend(list(call.args[0].shape) for call in calls) or compare(format, path, calls)
        ),
    )
    path = tmp_path / f"o.{format}"
    assert export_model(_model(), path, example_inputs=X, dynamic_shapes="batch=0").difference < 1e-5
    assert seen == [[3, 4], [4, 4]]
    if format == "onnx":
        onnx = pytest.importorskip("onnx")
        (given,) = onnx.load(path).graph.input
        assert [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim] == ["batch", 4]


def test_a_wrong_file_is_not_kept(tmp_path, monkeypatch):
    def wrong(job, path):
        model = job.module
        with torch.no_grad():
            model[0].bias.add_(1)
        torch.jit.save(torch.jit.script(model), path)
        with torch.no_grad():
            model[0].bias.sub_(1)

    monkeypatch.setitem(exporting.WRITERS, "torchscript", wrong)
    with pytest.raises(NumericError, match=r"o\.ts is not the model: .* the file is not kept"):
        export_model(_model(), tmp_path / "o.ts", example_inputs=X)
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_read_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.WRITERS, "torchscript", lambda job, path: path.write_bytes(b"no archive"))
    with pytest.raises(NumericError, match="cannot be read back"):
        export_model(_model(), tmp_path / "o.ts", example_inputs=X)
    assert os.listdir(tmp_path) == []


def test_what_is_not_compared_says_why(tmp_path):
    assert export_model(_model(), tmp_path / "a.ts").unverified == "there are no example inputs"
    noisy = nn.Sequential(nn.Linear(4, 4), _Noise())
    assert "random" in export_model(noisy, tmp_path / "b.pt2", example_inputs=X).unverified
    assert "train mode" in export_model(_model(), tmp_path / "c.ts", example_inputs=X, train=True).unverified


class _Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx", "torchscript"])
@pytest.mark.filterwarnings("ignore")
def test_keyword_arguments_and_a_dataclass_as_output(tmp_path, format):
    pytest.importorskip("onnxruntime") if format == "onnx" else None
    call = {"example_inputs": (X,), "example_kwargs": {"mask": torch.ones(3, 1)}}
    model = Masked(nested=format != "torchscript").eval()  # TorchScript has no dict of different types
    written = export_model(model, tmp_path / "o", format=format, **call)
    assert written.difference is not None
    assert written.difference < 1e-5
    assert isinstance(model(X, mask=torch.ones(3, 1)), Result)
    if format == "pt2":
        outputs = torch.export.load(tmp_path / "o").module()(X, mask=torch.ones(3, 1))
        assert list(outputs) == ["out", "both"]


def test_a_keyword_only_argument_cannot_be_traced(tmp_path):
    call = {"example_inputs": (X,), "example_kwargs": {"mask": torch.ones(3, 1), "scale": torch.ones(1)}}
    with pytest.raises(CaptureError, match="keyword-only arguments, which TorchScript does not have: scale"):
        export_model(Masked(), tmp_path / "o.ts", **call)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch", r"NAME=\[INPUT\.\]DIM"),
        ("batch=5", "no example input has a dimension 5"),
        ("batch=y.0", "its inputs are input"),
        ("a=0,b=0", "two names: a and b"),
    ],
)
def test_a_wrong_text_for_sizes_is_refused(tmp_path, text, message):
    with pytest.raises(RewriterError, match=message):
        export_model(_model(), tmp_path / "o.pt2", example_inputs=X, dynamic_shapes=text)


def test_sizes_that_contradict_the_examples_are_refused(tmp_path):
    class Two(nn.Module):
        def forward(self, x, h):
            return x.sum() + h.sum()

    for inputs, message in [
        ((X, torch.ones(2, 4)), r"batch is 3 in x\.0 and 2 in h\.0.*batch=x\.0"),
        ((X[:1], X), "size of 2"),
    ]:
        with pytest.raises(RewriterError, match=message):
            export_model(Two(), tmp_path / "o.pt2", example_inputs=inputs, dynamic_shapes="batch=0")
    with pytest.raises(RewriterError, match="torchscript fixes no size"):
        export_model(Two(), tmp_path / "o.ts", example_inputs=(X, X), dynamic_shapes="batch=0")


def test_a_size_that_the_model_fixes_is_refused(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[0] == 3 else x

    with pytest.raises(
        CaptureError, match=r"cannot be written as pt2: .*torch\.export suggests batch = 3. Leave batch out of the"
    ):
        export_model(Fixed(), tmp_path / "o.pt2", example_inputs=X, dynamic_shapes="batch=0")


@pytest.mark.parametrize("name", ["o.ts", "o.pt2", pytest.param("o.onnx", marks=pytest.mark.slow), "o.safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_a_file_says_where_its_weights_come_from(tmp_path, name):
    pytest.importorskip("onnxscript") if name == "o.onnx" else None
    new = rewriter.rewrite(nn.Sequential(nn.Linear(4, 3)).eval(), SPEC)
    origin = provenance(new)
    export_model(rewriter.bake(new), tmp_path / name, example_inputs=X, provenance=origin, verify=False)
    found = read_provenance(tmp_path / name)
    assert found == origin
    assert found["tensors"] == {"0.weight": {"rule": "s", "chain": ["spectral_norm"], "options": ""}}
    if name == "o.safetensors":
        safetensors = pytest.importorskip("safetensors")
        with safetensors.safe_open(tmp_path / name, "pt") as file:
            assert file.metadata()["format"] == "pt"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_large_weights_of_an_onnx_file_are_in_a_second_file(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    writers = exporting.WRITERS["onnx"].__globals__
    monkeypatch.setitem(writers, "EXTERNAL_OVER", 10)
    model = nn.Sequential(nn.Linear(4, 600), nn.Linear(600, 2)).eval()
    assert export_model(model, tmp_path / "o.onnx", example_inputs=X).difference < 1e-5
    assert sorted(os.listdir(tmp_path)) == ["o.onnx", "o.onnx.data"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("map", "operator"),
    [("matrix_exp", "linalg_matrix_exp"), ("cayley", "linalg_inv_ex"), ("householder", "linalg_solve_triangular")],
)
@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_computed_tensor_without_operator_says_bake_first(tmp_path, map, operator):
    pytest.importorskip("onnxscript")
    rule = {"name": "o", "select": "0.weight", "chain": [{"orthogonal": {"map": map}}]}
    new = rewriter.rewrite(nn.Sequential(nn.Linear(4, 4)).eval(), {"reparam": 1, "rules": [rule]})
    said = rf"no operator for aten\.{operator}.*0\.weight = orthogonal\(map={map}\): bake first$"
    with pytest.raises(CaptureError, match=said):
        export_model(new, tmp_path / "o.onnx", example_inputs=X)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_computed_tensor_with_operators_is_compared(tmp_path):
    pytest.importorskip("onnxruntime")
    new = rewriter.rewrite(nn.Sequential(nn.Linear(4, 3), nn.Tanh()).eval(), SPEC)
    assert export_model(new, tmp_path / "o.onnx", example_inputs=X, dynamic_shapes="batch=0").difference < 1e-5


def test_an_aoti_package_needs_a_compiler_and_a_name(tmp_path, monkeypatch):
    with pytest.raises(ModelFileError, match=r"ends in \.pt2"):
        export_model(_model(), tmp_path / "o", format="aoti", example_inputs=X)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CaptureError, match=r"install a C\+\+ compiler"):
        export_model(_model(), tmp_path / "o.pt2", format="aoti", example_inputs=X)


@pytest.mark.slow
def test_an_aoti_package_is_compiled_and_compared(tmp_path):
    new = rewriter.rewrite(nn.Sequential(nn.Linear(4, 3), nn.Tanh()).eval(), SPEC)
    origin = provenance(new)
    path = tmp_path / "o.pt2"
    written = export_model(
        rewriter.bake(new), path, format="aoti", example_inputs=X, dynamic_shapes="batch=0", provenance=origin
    )
    assert written.difference is not None
    assert written.difference < 1e-5
    assert read_provenance(path) == origin
    with pytest.raises(ModelFileError, match="compiled"):
        rewriter.io.load_model(path, trust=True)


def test_example_inputs_by_name_are_not_taken_for_a_list_of_names(tmp_path):
    with pytest.raises(CaptureError, match=r"not a dict; arguments by name are example_kwargs"):
        export_model(_model(), tmp_path / "o.pt2", example_inputs={"input": X})
