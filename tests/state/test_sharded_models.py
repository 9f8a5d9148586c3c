"""Models that `fully_shard` sharded over two processes: bake, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh

from rewriter import RewriterError, bake, evaluate_once, rewrite
from rewriter.export import export_model
from rewriter.io import load_model, save_model
from rewriter.state import convert_state_dict, freeze, get_value, set_value, unfreeze
from tests.processes import joined, run_processes, work

GLOO = dist.is_available() and dist.is_gloo_available() and sys.platform == "linux"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not GLOO, reason="needs gloo")]
X = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.fc(x)))


class Net(nn.Module):
    """Two blocks, a tied tensor and rows that two processes share unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.wide = nn.Linear(4, 3)
        self.head = nn.Linear(3, 4)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.wide(x)
        return self.head(x) + self.tied(x)


RULES: dict[str, tuple[str, Any]] = {
    "orthogonal": ("blocks.0.fc.weight", {"orthogonal": {"map": "cayley"}}),
    "spectral": ("blocks.1.fc.weight", "spectral_norm"),
    "lora": ("wide.weight", {"lora": {"r": 2, "init_lora_weights": False}}),
    "weight_norm": ("head.weight", "weight_norm"),
}


def rewritten(capture: str = "module", seed: int = 0, **other: Any) -> nn.Module:
    torch.manual_seed(seed)
    rules = [{"name": n, "select": s, "chain": [other.get(n, step)]} for n, (s, step) in RULES.items()]
    return rewrite(Net().double(), {"reparam": 1, "rules": rules}, capture=capture)


def sharded(model: nn.Module, blocks: bool = True) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    if blocks:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    torch.testing.assert_close({key: whole(value) for key, value in found.items()}, dict(expected))


@contextmanager
def group(rank: int, folder: str) -> Iterator[None]:
    with joined(rank, folder, 2):
        yield
        (Path(folder) / f"done{rank}").touch()


def trained(*models: nn.Module) -> None:
    for model in models:
        model(X).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()


def _bake(rank: int, folder: str) -> None:
    with group(rank, folder):
        for capture, blocks in (("module", True), ("module", False), ("graph", False)):
            reference = rewritten(capture)
            model = sharded(copy.deepcopy(reference), blocks)
            trained(model, reference)
            expected = bake(reference)
            for state in ("resharded", "unsharded"):
                if state == "unsharded":
                    assert isinstance(model, FSDPModule)
                    model.unshard()
                baked = bake(model)
                assert type(baked) is Net
                assert not any(isinstance(module, FSDPModule) for module in baked.modules())
                assert all(isinstance(parameter, DTensor) for parameter in baked.parameters())
                assert baked.tied.weight is baked.head.weight
                assert not any(
                    hooks for part in baked.modules() for hooks in (part._forward_hooks, part._backward_hooks)
                )
                assert_equal(baked.state_dict(), expected.state_dict())
            part = bake(model, only=["orthogonal"])
            assert_equal(part.state_dict(), bake(reference, only=["orthogonal"]).state_dict())
            model.eval()
            reference.eval()
            torch.testing.assert_close(model(X), reference(X))  # it was left alone
            _into_a_new_model(baked, expected)
            assert_equal(bake(model, inplace=True).state_dict(), expected.state_dict())


def _into_a_new_model(baked: nn.Module, expected: nn.Module) -> None:
    with torch.device("meta"):
        fresh = Net().double()
    sharded(fresh).load_state_dict(baked.state_dict(), assign=True)
    torch.testing.assert_close(fresh(X), expected(X))


def _refused(rank: int, folder: str) -> None:
    with group(rank, folder):
        model = sharded(rewritten())
        model(X)
        other = {"orthogonal": {"orthogonal": {"map": "matrix_exp"}}}
        refusals: dict[str, Callable[[], Any]] = {
            r"cannot shard blocks\.0 by itself.*capture='module'": lambda: sharded(rewritten("graph")),
            r"copies no such model: rewrite the model before": lambda: rewrite(model, {"reparam": 1, "rules": []}),
            r"save model\.state_dict\(\).*no_dist=True": lambda: save_model(model, f"{folder}/m{rank}.pt"),
            r"are distributed over processes": lambda: export_model(model, f"{folder}/m{rank}.safetensors"),
            r"fc\.weight cannot be set to this value": lambda: set_value(model, "blocks.0.fc.weight", torch.ones(4, 4)),
            r"map=matrix_exp": lambda: sharded(rewritten("module", 0, **other)).load_state_dict(model.state_dict()),
            r"takes no FullyShardedDataParallel.*convert_state_dict": lambda: bake(_flat()),
            r"not single steps": lambda: bake(_labelled(), only=["a"]),
        }
        for message, call in refusals.items():
            with pytest.raises(RewriterError) as raised:
                call()
            assert re.search(message, str(raised.value)), str(raised.value)


def _set(rank: int, folder: str) -> None:
    with group(rank, folder):
        for capture, blocks in (("module", True), ("graph", False)):
            reference = rewritten(capture)
            model = sharded(copy.deepcopy(reference), blocks)
            trained(model, reference)  # the root's tensors are whole after a forward
            for name, value in {
                "blocks.0.fc.weight": torch.eye(4),
                "blocks.1.fc.weight": torch.diag(torch.tensor([1.0, 0.5, 0.5, 0.5])),
                "tied.weight": torch.arange(12.0).reshape(4, 3),
                "head.bias": torch.arange(4.0),
            }.items():
                set_value(reference, name, value.double())
                set_value(model, name, value.double())
                torch.testing.assert_close(whole(get_value(model, name)), value.double())
            set_value(model, "tied.weight", get_value(model, "head.weight"))  # as shards
            trained(model, reference)
            torch.testing.assert_close(model(X), reference(X))


def _recompute(rank: int, folder: str) -> None:
    with group(rank, folder):
        rules = [{"name": n, "select": s, "chain": [step], "memory": "recompute"} for n, (s, step) in RULES.items()]
        for capture, blocks in (("module", True), ("graph", False)):
            torch.manual_seed(0)
            reference = rewrite(Net().double(), {"reparam": 1, "rules": rules}, capture=capture)
            model = sharded(copy.deepcopy(reference), blocks)
            for _ in range(2):
                trained(model, reference)
            for one, other in zip(model.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(whole(one), other)


def _freeze(rank: int, folder: str) -> None:
    with group(rank, folder):
        for capture, blocks in (("module", True), ("graph", False)):
            for only in (None, ["spectral", "lora"]):
                reference = rewritten(capture)
                model = sharded(copy.deepcopy(reference), blocks)
                trained(model, reference)  # the root's tensors are whole after a forward
                for verb in (freeze, unfreeze):
                    for one in (model, reference):
                        verb(one, only)
                        one.zero_grad()
                    for _ in range(2):
                        torch.testing.assert_close(model(X), reference(X))
                        trained(model, reference)
                    assert_equal(model.state_dict(), reference.state_dict())
                    torch.testing.assert_close(
                        whole(get_value(model, "wide.weight")), get_value(reference, "wide.weight")
                    )
                freeze(model, only)
                assert_equal(bake(model).state_dict(), bake(reference).state_dict())


def _flat() -> nn.Module:
    return FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))


def _labelled() -> nn.Module:
    rules = [{"name": "r", "select": "0.weight", "chain": [{"symmetric": {"label": "a"}}, "weight_norm"]}]
    model = rewrite(nn.Sequential(nn.Linear(4, 4)), {"reparam": 1, "rules": rules}, capture="module")
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def _values_across_forwards(rank: int, folder: str) -> None:
    with group(rank, folder):
        rules = [
            {"name": n, "select": s, "chain": [step], "cache": "version"}
            for n, (s, step) in RULES.items()
            if n != "spectral"  # whose state advances by the forward
        ]
        torch.manual_seed(0)
        reference = rewrite(Net().double(), {"reparam": 1, "rules": rules}, capture="module")
        model = sharded(copy.deepcopy(reference))
        for _ in range(2):
            with torch.no_grad():  # a value from before the optimizer's step would be stale
                torch.testing.assert_close(model(X), reference(X))
            trained(model, reference)
        for one in (model, reference):
            one.zero_grad()
            with evaluate_once(one):
                for part in X.split(2):
                    one(part).square().sum().backward()
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(whole(one.grad), other.grad)


def _checkpoints(rank: int, folder: str) -> None:
    with group(rank, folder):
        reference = invertible()
        model = sharded(copy.deepcopy(reference))
        trained(model, reference)
        expected = reference.eval()(X)
        dcp.save(model.state_dict(), checkpoint_id=f"{folder}/dcp")
        writer = HuggingFaceStorageWriter(f"{folder}/hf", save_distributed=True, enable_consolidation=True)
        dcp.save(once(model.state_dict()), storage_writer=writer)
        dist.barrier()
        reader = HuggingFaceStorageReader(f"{folder}/hf")
        for options in ({"checkpoint_id": f"{folder}/dcp"}, {"storage_reader": reader}):
            other = sharded(invertible(seed=1)).eval()
            state = other.state_dict()
            dcp.load(once(state), **options)
            other.load_state_dict(state)
            torch.testing.assert_close(other(X), expected)
        file = f"{folder}/hf/model-00001-of-00001.safetensors"
        torch.testing.assert_close(load_model(file, model=lambda: invertible("graph", 1)).eval()(X), expected)
        if rank == 0:
            _in_one_file(folder, expected)
        _other_forms(model.eval(), reference)


def _in_one_file(folder: str, expected: Tensor) -> None:
    """What `save_model` of a sharded model says to do instead."""
    alone = invertible(seed=1)
    state = alone.state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/dcp", no_dist=True)
    alone.load_state_dict(state)
    save_model(alone, f"{folder}/model.pt")
    loaded = load_model(f"{folder}/model.pt", allow=["tests.state.test_sharded_models.*", "__main__.*"])
    torch.testing.assert_close(loaded.eval()(X), expected)


def invertible(capture: str = "module", seed: int = 0) -> nn.Module:
    """A model of which every chain takes any value of the others."""
    return rewritten(capture, seed, spectral="symmetric")


def once(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with each tensor under one name, as safetensors need it."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("tied.parametrizations.")}


def _other_forms(model: nn.Module, reference: nn.Module) -> None:
    plain = bake(reference)
    for name in ("blocks.0.fc.weight", "wide.weight", "tied.weight"):
        torch.testing.assert_close(whole(get_value(model, name)), plain.get_parameter(name).detach())
    shards = convert_state_dict(model.state_dict(), model, to="plain")
    assert all(isinstance(tensor, DTensor) for tensor in shards.values())
    assert_equal(shards, plain.state_dict())
    other = sharded(invertible(seed=1)).eval()
    other.load_state_dict(shards)  # through the right inverses
    torch.testing.assert_close(other(X), plain(X))
    other = sharded(invertible(seed=2)).eval()
    full = convert_state_dict(plain.state_dict(), other, to="rewritten")
    set_model_state_dict(other, once(full), options=StateDictOptions(full_state_dict=True, strict=False))
    torch.testing.assert_close(other(X), plain(X))


@pytest.mark.parametrize(
    "worker",
    [_bake, _checkpoints, _freeze, _recompute, _refused, _set, _values_across_forwards],
    ids=lambda worker: worker.__name__[1:],
)
def test_two_processes_agree_with_one(worker: Callable[[int, str], None], tmp_path: Path) -> None:
    run_processes(worker, tmp_path, 2)
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}


if __name__ == "__main__":
    work(globals())
