"""Baked models of several architectures in each format, at the example's sizes and at others."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

import rewriter
from rewriter.errors import CaptureError, ModelFileError
from rewriter.export import export_model
from rewriter.export._read_back import READERS, plain

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 50, (2, 6), generator=GENERATOR)
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.bn2, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 5)
        for norm in (self.bn1, self.bn2):
            nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 1, 2)

    def forward(self, x):
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Tcn(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, dilation=2**i) for i in range(3))

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            x = x + torch.relu(conv(functional.pad(x, [2 * 2**i, 0])))
        return x


class Rnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.inputs = nn.Linear(6, 6, bias=False), nn.Linear(4, 6)

    def forward(self, x):
        hidden = x.new_zeros(x.size(0), 6)
        for step in range(100):
            hidden = torch.tanh(self.cell(hidden) + self.inputs(x[:, step]))
        return hidden


def _transformer(name, **settings):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name.removesuffix("LMHeadModel").removesuffix("Model") + "Config")
    return getattr(transformers, name)(config(**settings))


def _gpt2():
    return _transformer("GPT2LMHeadModel", vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "cnn": (Cnn, "conv*.weight", "spectral_norm", {"x": torch.randn(2, 3, 8, 8, generator=GENERATOR)}),
    "lstm": (Lstm, "lstm.weight_hh_l*", "weight_norm", {"x": torch.randn(2, 7, 4, generator=GENERATOR)}),
    "tcn": (Tcn, "convs.*.weight", "weight_norm", {"x": torch.randn(2, 4, 9, generator=GENERATOR)}),
    "rnn": (Rnn, "cell.weight", "orthogonal", {"x": torch.randn(2, 100, 4, generator=GENERATOR)}),
    "bert": (lambda: _transformer("BertModel", vocab_size=50, **SMALL), "**.query.weight", "orthogonal", TEXT),
    "gpt2": (_gpt2, "**.c_attn.weight", "spectral_norm", TEXT),
    "vit": (
        lambda: _transformer("ViTModel", image_size=8, patch_size=4, **SMALL),
        "pooler.dense.weight",
        "spectral_norm",
        {"pixel_values": torch.randn(2, 3, 8, 8, generator=GENERATOR)},
    ),
}


def _models(name):
    """Return the plain model, the rewritten one, and a call."""
    torch.manual_seed(0)
    make, pattern, chain, call = MODELS[name]
    model = make().eval()
    rule = {"name": "r", "select": pattern, "chain": [chain], **({"reshape": ["out", -1]} if name == "cnn" else {})}
    return model, rewriter.rewrite(model, {"reparam": 1, "rules": [rule]}), {"example_kwargs": call}


def _operations(path, format):
    if format == "torchscript":
        return sum(1 for _ in torch.jit.freeze(torch.jit.load(path).eval()).graph.nodes())
    if format == "onnx":
        return len(pytest.importorskip("onnx").load(path).graph.node)
    return sum(node.op == "call_function" for node in torch.export.load(path).graph.nodes)


CASES = [(name, format) for name in MODELS for format in ("torchscript", "pt2", "onnx")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format"), [*CASES, pytest.param("cnn", "aoti", marks=pytest.mark.timeout(1800))])
@pytest.mark.filterwarnings("ignore")
def test_a_baked_model_has_the_values_and_operations_of_the_plain_one(tmp_path, name, format):
    pytest.importorskip("onnxruntime") if format == "onnx" else None
    model, new, call = _models(name)
    baked = rewriter.bake(new)
    before = copy.deepcopy(baked.state_dict())
    text = ",time=1:2..16" if call["example_kwargs"] is TEXT else ""
    sizes = {} if format == "torchscript" else {"dynamic_shapes": f"batch=0{text}"}
    path, other = (tmp_path / f"{file}{'.pt2' if format in ('pt2', 'aoti') else ''}" for file in ("baked", "plain"))
    written = export_model(baked, path, format=format, **call, **sizes)  # compares at both sizes, if one varies
    assert written.difference is not None, written.unverified
    assert written.difference <= 1e-5
    torch.testing.assert_close(baked.state_dict(), before, rtol=0, atol=0)
    if format == "aoti":
        return
    export_model(model, other, format=format, verify=False, **call, **sizes)
    assert _operations(path, format) == _operations(other, format)
    larger = {name: torch.cat([value, value[:1]]) for name, value in call["example_kwargs"].items()}
    with torch.no_grad():
        wanted = plain(new(**larger))
        found = READERS[format](str(path))(**larger)
    first = [next(iter(one.values())) if isinstance(one, dict) else one for one in (found, wanted)]
    torch.testing.assert_close(*(one[0] if isinstance(one, list) else one for one in first), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_folder_of_a_baked_model_keeps_its_configurations(tmp_path):
    transformers = pytest.importorskip("transformers")
    _, new, call = _models("gpt2")
    new.generation_config.max_new_tokens = 7
    baked = rewriter.bake(new)
    written = export_model(baked, tmp_path / "o", format="hf", **call)
    assert written.difference is not None, written.unverified
    assert written.difference < 1e-5
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "o")
    assert again.generation_config.max_new_tokens == 7
    torch.testing.assert_close(again.state_dict(), baked.state_dict())
    assert json.loads((tmp_path / "o" / "reparam.json").read_text())["tensors"] == {}
    with pytest.raises(ModelFileError, match="exists"):
        export_model(baked, tmp_path / "o", format="hf")
    export_model(baked, tmp_path / "o", format="hf", force=True, verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o"]
    with pytest.raises(CaptureError, match=r"c_attn\.weight = spectral_norm.*bake first"):
        export_model(new, tmp_path / "p", format="hf")
    with pytest.raises(CaptureError, match="no model of transformers"):
        export_model(nn.Linear(2, 2), tmp_path / "p", format="hf")
