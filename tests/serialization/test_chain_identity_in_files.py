"""Files of weights say from which chains they were saved, and weights of another chain are refused."""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rewriter import absorb, rewrite
from rewriter.errors import ModelFileError
from rewriter.export import export_model
from rewriter.io import load_model

OTHER: dict[str, tuple[Any, Any]] = {
    "an argument": ({"lora": {"r": 2, "lora_alpha": 2}}, {"lora": {"r": 2, "lora_alpha": 64}}),
    "a map": ({"orthogonal": {"map": "cayley"}}, {"orthogonal": {"map": "matrix_exp"}}),
    "a step": ("symmetric", "skew"),
}


def maker(step: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        spec = {"reparam": 1, "rules": [{"name": "r", "select": "*.weight", "chain": [step]}]}
        return rewrite(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), spec)

    return make


def header(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]


def save(model: nn.Module, path: Path, prefix: str) -> None:
    if path.suffix == ".safetensors":
        export_model(nn.ModuleDict({prefix[:-1]: model}) if prefix else model, path)
    else:
        torch.save((nn.ModuleDict({prefix[:-1]: model}) if prefix else model).state_dict(), path)


@pytest.mark.filterwarnings("ignore:removed the prefix")
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("case", OTHER)
def test_weights_of_another_chain_are_refused_with_both(case: str, suffix: str, prefix: str, tmp_path: Path) -> None:
    one, other = (maker(step) for step in OTHER[case])
    save(other(), tmp_path / f"w{suffix}", prefix)
    chains = [make().get_submodule("0.parametrizations.weight").spec.chain[0] for make in (other, one)]
    with pytest.raises(ModelFileError) as raised:
        load_model(tmp_path / f"w{suffix}", model=one)
    text = str(raised.value)
    assert text.index("0.weight") < text.index(chains[0]) < text.index(chains[1])
    assert "2.weight" in text


@pytest.mark.filterwarnings("ignore:removed the prefix")
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_the_same_chain_load(suffix: str, prefix: str, tmp_path: Path) -> None:
    make = maker({"orthogonal": {"map": "cayley"}})
    source = make()
    save(source, tmp_path / f"w{suffix}", prefix)
    loaded = load_model(tmp_path / f"w{suffix}", model=make)
    torch.testing.assert_close(loaded.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_the_header_keeps_the_format_that_other_readers_need(tmp_path: Path) -> None:
    export_model(maker("symmetric")(), tmp_path / "w.safetensors")
    entry = {"chain": ["symmetric()"], "options": ""}
    found = header(tmp_path / "w.safetensors")
    assert found["format"] == "pt"
    assert list(json.loads(found["reparam"])) == ["0.parametrizations.weight", "2.parametrizations.weight"]
    assert json.loads(found["reparam"])["0.parametrizations.weight"].keys() == entry.keys()


def test_plain_and_absorbed_models_have_no_entry(tmp_path: Path) -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    for name, model in {"plain": nn.Linear(3, 3), "absorbed": absorb(normed)}.items():
        export_model(model, tmp_path / f"{name}.safetensors")
        assert header(tmp_path / f"{name}.safetensors").keys() == {"format", "reparam.provenance"}


@pytest.mark.parametrize("case", OTHER)
def test_a_file_without_the_entry_loads_as_before(case: str, tmp_path: Path) -> None:
    one, other = (maker(step) for step in OTHER[case])
    source = other()
    save_file(dict(source.state_dict()), tmp_path / "w.safetensors")
    loaded = load_model(tmp_path / "w.safetensors", model=one)
    torch.testing.assert_close(dict(loaded.state_dict()), load_file(tmp_path / "w.safetensors"), rtol=0, atol=0)


def test_tied_weights_load_with_their_identity(tmp_path: Path) -> None:
    def make(step: str = "symmetric") -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
        model[1].weight = model[0].weight
        spec = {"reparam": 1, "rules": [{"name": "r", "select": "0.weight", "chain": [step]}]}
        return rewrite(model, spec)

    source = make()
    export_model(source, tmp_path / "w.safetensors")
    loaded = load_model(tmp_path / "w.safetensors", model=make)
    torch.testing.assert_close(loaded.state_dict(), source.state_dict(), rtol=0, atol=0)
    with pytest.raises(ModelFileError, match=r"(?s)symmetric.*skew"):
        load_model(tmp_path / "w.safetensors", model=lambda: make("skew"))


@pytest.mark.parametrize("text", ["{", "3", "[1]", '"x"'])
def test_a_damaged_entry_of_the_header_is_refused(text: str, tmp_path: Path) -> None:
    make = maker("symmetric")
    save_file(dict(make().state_dict()), tmp_path / "w.safetensors", metadata={"reparam": text})
    with pytest.raises(ModelFileError, match=r"w\.safetensors cannot be read"):
        load_model(tmp_path / "w.safetensors", model=make)


@pytest.mark.parametrize("metadata", ["text", {3: {}, "0": 4}, {"": {"version": 1}}], ids=repr)
def test_odd_metadata_of_a_state_dict_is_left_out(metadata: Any, tmp_path: Path) -> None:
    make = maker("symmetric")
    state = OrderedDict(make().state_dict())
    state._metadata = metadata
    torch.save(state, tmp_path / "w.pt")
    torch.testing.assert_close(dict(load_model(tmp_path / "w.pt", model=make).state_dict()), dict(state))
