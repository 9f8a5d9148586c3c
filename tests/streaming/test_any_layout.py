"""However tensors lie in shards, tied or not, streaming gives the bits that the model in memory gives."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rewriter import bake, rewrite
from rewriter.streaming import apply_checkpoint, bake_checkpoint
from tests.streaming.conftest import assert_equal, contiguous, read_folder, spec, tree

CHAINS: list[list[Any]] = [
    ["symmetric"],
    ["weight_norm"],
    ["spectral_norm"],
    ["orthogonal"],
    [{"lora": {"r": 2}}],
    [{"dora": {"r": 2}}],
    [{"low_rank": {"rank": 2}}],
    [{"l1_unstructured": {"amount": 0.5}}],
    [{"fake_quantize": {"bits": 4}}],
    [{"scale": {"factor": 2.0}}, "weight_norm"],
    ["symmetric", {"lora": {"r": 1}}],
]
layouts = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(3, 6), min_size=1, max_size=4),
        "chain": st.sampled_from(CHAINS),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
        "tied": st.booleans(),
        "shards": st.integers(1, 4),
        "seed": st.integers(0, 2**31),
        "workers": st.integers(1, 3),
    }
)


def model_of(sizes: list[int], dtype: torch.dtype, tied: bool) -> nn.Module:
    tensors = {f"{index}.weight": torch.randn(size, size).to(dtype) for index, size in enumerate(sizes)}
    model = tree({**tensors, "norm.bias": torch.randn(3).to(dtype)})
    if tied:
        model.add_module("head", nn.Module())
        model.get_submodule("head").register_parameter("weight", model.get_parameter("0.weight"))
    return model


def write(folder: Path, state: dict[str, Tensor], aliases: dict[str, str], shards: int, seed: int) -> Path:
    """Write a state dict, each tensor into any of the shards; an alias stands beside the tensor that it names."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    numbers = {name: int(torch.randint(shards, (1,), generator=generator)) for name in state}
    places = {name: f"{number}.safetensors" for name, number in numbers.items()}
    for file in set(places.values()):
        tensors = {name: tensor for name, tensor in state.items() if places[name] == file}
        save_file(tensors, folder / file, {alias: kept for alias, kept in aliases.items() if kept in tensors})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def untied(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state with each tied tensor once, and the other names."""
    aliases = {name: name.replace("head.", "0.", 1) for name in state if name.startswith("head.")}
    return {name: tensor for name, tensor in contiguous(state).items() if name not in aliases}, aliases


def aliases_in(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {key: text for key, text in (opened.metadata() or {}).items() if key.startswith("head.")}
    return found


@given(layout=layouts)
def test_any_layout_is_baked_to_the_bit(layout: dict[str, Any]) -> None:
    torch.manual_seed(layout["seed"])
    rules = spec(*layout["chain"])
    plain = model_of(layout["sizes"], layout["dtype"], layout["tied"])
    model = rewrite(plain, rules, capture="module")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) / 10)
    state, aliases = untied(dict(model.state_dict()))
    wanted, names = untied(dict(bake(model).state_dict()))
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name) / "in", state, aliases, layout["shards"], layout["seed"])
        bake_checkpoint(folder, rules, Path(name) / "out", workers=layout["workers"])
        assert_equal(read_folder(Path(name) / "out"), wanted)
        assert aliases_in(Path(name) / "out") == names


DRAWN = ("spectral_norm", "lora", "dora")


@given(layout=layouts.filter(lambda layout: not any(name in str(layout["chain"]) for name in DRAWN)))
def test_any_layout_is_rewritten_to_the_bit(layout: dict[str, Any]) -> None:
    torch.manual_seed(layout["seed"])
    rules = spec(*layout["chain"])
    plain = model_of(layout["sizes"], layout["dtype"], layout["tied"])
    state, aliases = untied(dict(plain.state_dict()))
    wanted, names = untied(dict(rewrite(plain, rules, capture="module").state_dict()))
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name) / "in", state, aliases, layout["shards"], layout["seed"])
        apply_checkpoint(folder, rules, Path(name) / "out", workers=layout["workers"])
        assert_equal(read_folder(Path(name) / "out"), wanted)
        assert aliases_in(Path(name) / "out") == names
