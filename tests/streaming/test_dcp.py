"""Folders that torch.distributed.checkpoint wrote."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from rewriter import ModelFileError, bake, rewrite
from rewriter.streaming import bake_checkpoint
from rewriter.streaming._dcp import SHARD
from tests.cli.conftest import reparam as reparam
from tests.streaming.conftest import assert_equal, contiguous, read_folder, spec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
RULES = spec("weight_norm", select="*.weight")


@pytest.fixture
def model() -> nn.Module:
    made = rewrite(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)), RULES)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return made


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp"


def test_the_model_of_a_training_checkpoint_is_baked(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    bake_checkpoint(folder, RULES, tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), contiguous(bake(model).state_dict()))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_large_models_get_shards_and_an_index(
    model: nn.Module, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SHARD == 5_000_000_000
    monkeypatch.setattr("rewriter.streaming._dcp.SHARD", 60)
    bake_checkpoint(folder, RULES, tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), contiguous(bake(model).state_dict()))
    assert (tmp_path / "out/model.safetensors.index.json").exists()


def test_the_command_takes_the_folder(reparam: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(
        "reparam: 1\nrules:\n  - {name: all, select: '*.weight', chain: [weight_norm]}\n"
    )
    assert reparam("bake", folder, "--spec", tmp_path / "spec.yaml", "-o", tmp_path / "out").code == 0
    assert "0.weight" in read_folder(tmp_path / "out")


def test_pieces_of_several_processes_are_put_together(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    whole = torch.randn(4, 4)
    dcp.save(
        {"a.weight": whole[:3].clone(), "b.weight": whole[3:].clone()}, checkpoint_id=tmp_path / "in", no_dist=True
    )
    file = tmp_path / "in/.metadata"
    metadata = pickle.loads(file.read_bytes())
    places = {index.fqn: info for index, info in metadata.storage_data.items()}
    entry = metadata.state_dict_metadata.pop("a.weight")
    del metadata.state_dict_metadata["b.weight"]
    entry.size, size = torch.Size([4, 4]), torch.Size
    entry.chunks = [ChunkStorageMetadata(size([0, 0]), size([3, 4])), ChunkStorageMetadata(size([3, 0]), size([1, 4]))]
    metadata.state_dict_metadata["w"] = entry
    metadata.storage_data = {
        MetadataIndex("w", size([0, 0]), 0): places["a.weight"],
        MetadataIndex("w", size([3, 0]), 1): places["b.weight"],
    }
    file.write_bytes(pickle.dumps(metadata))
    bake_checkpoint(tmp_path / "in", spec("identity", select="w"), tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), {"w": whole})
    entry.chunks[1] = ChunkStorageMetadata(size([2, 0]), size([1, 4]))
    metadata.storage_data[MetadataIndex("w", size([2, 0]), 1)] = places["b.weight"]
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ModelFileError, match="overlap"):
        bake_checkpoint(tmp_path / "in", spec("identity", select="w"), tmp_path / "other")


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch attacked",)


def cut(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1000])


DAMAGES = {
    "code": (lambda f: (f / ".metadata").write_bytes(pickle.dumps(Attack())), "asks for posix.system"),
    "no pickle": (lambda f: (f / ".metadata").write_bytes(b"nonsense"), "is damaged"),
    "empty": (lambda f: (f / ".metadata").write_bytes(b""), "is damaged"),
    "missing file": (lambda f: next(f.glob("*.distcp")).unlink(), "that are not there"),
    "other object": (lambda f: (f / ".metadata").write_bytes(pickle.dumps({"a": 1})), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_and_run_no_code(
    damage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = DAMAGES[damage]
    make(folder)
    with pytest.raises(ModelFileError, match=message):
        bake_checkpoint(folder, RULES, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["dcp"]
