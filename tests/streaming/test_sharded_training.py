"""From training over two processes to a folder of plain weights, without the whole model in one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from rewriter import bake, rewrite
from rewriter.streaming import bake_checkpoint
from tests.processes import joined, run_processes, work
from tests.streaming.conftest import read_folder

GLOO = dist.is_available() and dist.is_gloo_available() and sys.platform == "linux"
SPEC = {
    "reparam": 1,
    "rules": [
        {"name": "norm", "select": "0.weight", "chain": ["weight_norm"]},
        {"name": "adapter", "select": "2.weight", "chain": [{"lora": {"r": 2, "init_lora_weights": False}}]},
    ],
}
X = torch.linspace(-1, 1, 32).reshape(8, 4)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return rewrite(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), SPEC, capture="module")


def _train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def train(rank: int, folder: str) -> None:
    with joined(rank, folder, 2):
        model = _model()
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model.get_submodule("0"), model.get_submodule("2"), model):
            fully_shard(layer, mesh=mesh)
        _train(model, X[rank::2])
        dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
        dist.barrier()


@pytest.mark.slow
@pytest.mark.skipif(not GLOO, reason="needs gloo")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_checkpoint_of_shards_becomes_a_folder_of_plain_weights(tmp_path: Path) -> None:
    run_processes(train, tmp_path, 2)
    bake_checkpoint(tmp_path / "checkpoint", SPEC, tmp_path / "plain")
    # Halves of a batch, averaged over the processes, are one step over the whole batch.
    alone = _model()
    _train(alone, X)
    found = read_folder(tmp_path / "plain")
    expected = bake(alone).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


if __name__ == "__main__":
    work(globals())
