"""Checkpoints on disk, and the same work done in memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.rules import one_rule

spec = functools.partial(one_rule, select="**.weight")


def tree(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a module that has these tensors as parameters and nothing else."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point()))
    return root.eval()


def contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def write_folder(folder: Path, shards: Sequence[Mapping[str, Tensor]], **others: str) -> Path:
    """Write a folder as transformers does: shards, their index, and files with the texts `others`."""
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(contiguous(shard), folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
    size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, text in others.items():
        (folder / name.replace("_json", ".json")).write_text(text)
    return folder


def read_folder(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare to the last bit; a NaN equals a NaN."""
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        one = found[name]
        assert (one.dtype, one.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(one.reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)), name
