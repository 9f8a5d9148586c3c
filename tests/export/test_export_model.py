"""Each format gives the model's outputs in the program that reads it, or an error with the reason."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import warnings

import pytest
import torch
from torch import fx, nn

import rewriter
import rewriter.export
from rewriter.errors import CaptureError, ModelFileError, RewriterError
from rewriter.export import example_tensor, format_of
from rewriter.io import load_model

export_model = functools.partial(rewriter.export.export_model, verify=False)
"""Without a new process for each file; test_verified.py has those."""
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


class Untypable(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.fc = inner or nn.Linear(4, 2)

    def forward(self, x, **options):
        return self.fc(x)


class Branching(Untypable):
    def forward(self, x, **options):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def _tied():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()


def test_module(model, tmp_path):
    export_model(model, tmp_path / "out.pt")
    assert torch.equal(load_model(tmp_path / "out.pt")(X), model(X))


@pytest.mark.parametrize("form", ["module", "graph", "program"])
def test_torchscript(model, tmp_path, form):
    given = {
        "module": lambda: model,
        "graph": lambda: fx.symbolic_trace(model),
        "program": lambda: torch.export.export(model, (X,)),
    }[form]()
    with warnings.catch_warnings():
        if form == "program":  # its graph is traced, and says it
            warnings.simplefilter("ignore")
        export_model(given, tmp_path / "out.pt", format="torchscript")
    assert torch.allclose(torch.jit.load(tmp_path / "out.pt")(X), model(X))


class Optional(Untypable):
    """Torch scripts it, and cannot save the script."""

    def forward(self, x, lengths=None):
        return self.fc(x)


@pytest.mark.parametrize("kind", [Untypable, Optional])
def test_what_cannot_be_scripted_is_traced_with_example_inputs(tmp_path, kind):
    model = kind()
    message = rf"(?s)torch.jit.script does not take the {kind.__name__}.*example_inputs"
    with pytest.raises(CaptureError, match=message):
        export_model(model, tmp_path / "out.pt", format="torchscript")
    assert os.listdir(tmp_path) == []
    with pytest.warns(UserWarning, match=f"{kind.__name__} was traced, not scripted"):
        export_model(model, tmp_path / "out.pt", format="torchscript", example_inputs=[X])
    assert torch.allclose(torch.jit.load(tmp_path / "out.pt")(X), model(X))


def test_a_branch_that_tracing_fixes_warns(tmp_path):
    with pytest.warns(torch.jit.TracerWarning, match="boolean"), pytest.warns(UserWarning, match="was traced"):
        export_model(Branching(), tmp_path / "out.pt", format="torchscript", example_inputs=X)


def test_a_warning_of_the_tracer_is_given_once_for_each_export(tmp_path):
    class Sequence(Untypable):
        def forward(self, x, **options):
            return self.fc(x.unsqueeze(0))[0]

    for name in ("a", "b"):
        with pytest.warns(Warning) as found:
            export_model(Sequence(nn.LSTM(4, 2)).eval(), tmp_path / f"{name}.ts", example_inputs=X)
        texts = [str(one.message) for one in found if one.category is torch.jit.TracerWarning]
        assert texts
        assert len(texts) == len(set(texts))


def test_a_scripted_model_gives_no_warning(model, tmp_path, recwarn):
    export_model(model, tmp_path / "out.pt", format="torchscript", example_inputs=X)
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("name", "format"),
    [("o.pt", "module"), ("o.ts", "torchscript"), ("o.pt2", "pt2"), ("o.safetensors", "safetensors"), ("o", "module")],
)
def test_the_format_follows_from_the_suffix(model, tmp_path, name, format):
    assert format_of(model, name) == format
    export_model(model, tmp_path / name, example_inputs=X)
    if format == "torchscript":
        torch.jit.load(tmp_path / name)
    elif format == "safetensors":
        assert load_model(tmp_path / name, model=lambda: model) is model
    else:
        assert isinstance(load_model(tmp_path / name, trust=True), nn.Module) is (format == "module")


def test_a_program_without_format_is_written_as_pt2(model, tmp_path):
    program = torch.export.export(model, (X,))
    export_model(program, tmp_path / "out")
    assert torch.allclose(load_model(tmp_path / "out", trust=True).module()(X), model(X))


def test_torchscript_without_a_suffix(model, tmp_path):
    export_model(model, tmp_path / "out", format="torchscript")
    assert torch.allclose(torch.jit.load(tmp_path / "out")(X), model(X))


def _noisy():
    torch.manual_seed(0)
    layers = [
        nn.Linear(4, 3),
        nn.BatchNorm1d(3),
        nn.Dropout(0.5),
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
    ]
    return rewriter.absorb(nn.Sequential(*layers)).train()


STATEFUL = {"noisy": _noisy, "traced": lambda: Untypable(nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)))}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("format", ["torchscript", "pt2", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.filterwarnings("ignore")
def test_an_export_changes_no_state(tmp_path, name, format, train):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    model = STATEFUL[name]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    try:
        export_model(model, tmp_path / "out", format=format, example_inputs=X, train=train)
    except CaptureError:
        assert train or format == "torchscript"
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


def test_a_model_in_train_mode_is_exported_in_eval_mode(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.9)).train()
    expected = copy.deepcopy(model).eval()(X)
    export_model(model, tmp_path / "out.ts", example_inputs=X)
    assert torch.allclose(torch.jit.load(tmp_path / "out.ts")(X), expected)
    export_model(model, tmp_path / "out.pt2", example_inputs=X)
    assert torch.allclose(load_model(tmp_path / "out.pt2", trust=True).module()(X), expected)
    export_model(model, tmp_path / "train.ts", train=True)
    assert torch.jit.load(tmp_path / "train.ts").training


def test_pt2(model, tmp_path):
    export_model(model, tmp_path / "out.pt2", format="pt2", example_inputs=[X])
    assert torch.allclose(load_model(tmp_path / "out.pt2", trust=True).module()(X), model(X))


def test_safetensors_keeps_ties(tmp_path):
    model = _tied()
    export_model(model, tmp_path / "out.safetensors", format="safetensors")
    safetensors = pytest.importorskip("safetensors.torch")
    assert len(safetensors.load_file(tmp_path / "out.safetensors")) == 1
    again = load_model(tmp_path / "out.safetensors", model=_tied)
    assert again["head"].weight is again["embed"].weight
    assert torch.equal(again["embed"].weight, model["embed"].weight)


def test_onnx(model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_model(model, tmp_path / "out.onnx", format="onnx", example_inputs=[X])
    session = runtime.InferenceSession(tmp_path / "out.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert torch.allclose(torch.from_numpy(got), model(X), atol=1e-5)
    assert os.listdir(tmp_path) == ["out.onnx"]


def test_onnx_without_its_packages_names_the_extra(model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    with pytest.raises(CaptureError, match=r"pip install 'reparam\[onnx\]'"):
        export_model(model, tmp_path / "out.onnx", format="onnx", example_inputs=[X])


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_formats_that_need_example_inputs_say_so(model, tmp_path, format):
    pytest.importorskip("onnxscript")
    with pytest.raises(CaptureError, match=r"needs example inputs: example_inputs=\(…,\)"):
        export_model(model, tmp_path / "out", format=format)


def test_an_unknown_format_is_refused(model, tmp_path):
    with pytest.raises(ModelFileError, match="known are module, torchscript"):
        export_model(model, tmp_path / "out", format="tflite")


def test_an_existing_file_is_kept(model, tmp_path):
    (tmp_path / "out.pt").write_text("precious")
    with pytest.raises(ModelFileError, match="--force"):
        export_model(model, tmp_path / "out.pt", format="torchscript")
    assert (tmp_path / "out.pt").read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("float32[2,3,8]", (2, 3, 8), torch.float32),
        ("torch.int64[ 4 ]", (4,), torch.int64),
        ("bool[]", (), torch.bool),
        ("bfloat16[1,2]", (1, 2), torch.bfloat16),
    ],
)
def test_example_inputs_are_read_from_text(text, shape, dtype):
    example = example_tensor(text)
    assert (tuple(example.shape), example.dtype) == (shape, dtype)


@pytest.mark.parametrize("text", ["", "float32", "float32[2,]", "float32[-1]", "load[2]", "nn[2]", "float32[2][3]"])
def test_a_wrong_example_input_is_refused(text):
    with pytest.raises(RewriterError, match=r"dtype\[size"):
        example_tensor(text)
