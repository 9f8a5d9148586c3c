"""Models of transformers whose class applies weight_norm in its constructor."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from rewriter import RewriterError, absorb, bake
from rewriter.io import load_model, save_model

transformers = pytest.importorskip("transformers")

X = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["Wav2Vec2", "Hubert", "WavLM"])
def model(request):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**sizes)
    return getattr(transformers, f"{request.param}Model")(config).eval()


def test_a_baked_model_refuses_save_pretrained(model, tmp_path):
    baked = bake(absorb(model))
    for one in (baked, copy.deepcopy(baked)):
        with pytest.raises(RewriterError, match="Call save_pretrained before bake"):
            one.save_pretrained(tmp_path)
    torch.testing.assert_close(baked(X)[0], model(X)[0], atol=1e-5, rtol=1e-5)


def test_an_absorbed_model_saves_what_from_pretrained_reads(model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        absorb(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(X)[0], model(X)[0], atol=1e-5, rtol=1e-5)


def test_a_baked_model_is_saved_as_a_file(model, tmp_path):
    baked = bake(absorb(model))
    save_model(baked, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt", allow=["transformers.*"])
    torch.testing.assert_close(loaded(X)[0], model(X)[0], atol=1e-5, rtol=1e-5)


def test_other_models_keep_save_pretrained(tmp_path):
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = transformers.BertModel(config)
    torch.nn.utils.parametrizations.weight_norm(model.pooler.dense)
    baked = bake(absorb(model))
    baked.save_pretrained(tmp_path)
    again = transformers.BertModel.from_pretrained(tmp_path)
    assert torch.equal(again.pooler.dense.weight, baked.pooler.dense.weight)
