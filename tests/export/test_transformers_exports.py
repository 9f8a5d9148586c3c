"""Baked models of transformers in each format, with outputs that are dicts and a batch that varies."""

from __future__ import annotations

import json

import pytest
import torch

import rewriter
from rewriter.errors import CaptureError, ModelFileError
from rewriter.export import export_model

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))
CALL = {"example_kwargs": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}}


def _gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval(), "**.c_attn.weight"


def _bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config).eval(), "**.query.weight"


def _rewritten(make):
    model, pattern = make()
    rule = {"name": "s", "select": pattern, "chain": ["spectral_norm"]}
    return rewriter.rewrite(model, {"reparam": 1, "rules": [rule]})


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torchscript", "pt2", "onnx"])
@pytest.mark.parametrize("make", [_gpt2, _bert])
@pytest.mark.filterwarnings("ignore")
def test_a_baked_model_is_exported(tmp_path, make, format):
    pytest.importorskip("onnxruntime") if format == "onnx" else None
    model = rewriter.bake(_rewritten(make))
    varies = {} if format == "torchscript" else {"dynamic_shapes": "batch=0,time=1:2..16"}
    written = export_model(model, tmp_path / "o", format=format, **CALL, **varies)
    assert written.difference is not None, written.unverified
    assert written.difference < 1e-5
    assert getattr(model.config, "use_cache", None) in (None, True, False)
    with torch.no_grad():
        expected = model(**CALL["example_kwargs"])[0]
    if format == "torchscript":
        found = torch.jit.load(tmp_path / "o")(**CALL["example_kwargs"])
        torch.testing.assert_close(next(iter(found.values())), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_folder_of_a_baked_model_keeps_its_configurations(tmp_path):
    new = _rewritten(_gpt2)
    new.generation_config.max_new_tokens = 7
    baked = rewriter.bake(new)
    written = export_model(baked, tmp_path / "o", format="hf", **CALL)
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
        export_model(torch.nn.Linear(2, 2), tmp_path / "p", format="hf")
