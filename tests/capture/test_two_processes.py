"""Tensors that are distributed over two processes, before a model is rewritten and after."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from benchmarks.serving import STEPS
from rewriter import bake, rewrite
from rewriter.sites import Site
from tests.members import members
from tests.processes import joined, run_processes, work

CHAINS: dict[str, Any] = {"scale": {"scale": {"factor": 2.0}}, "spectral_norm": "spectral_norm"}
WHOLE: dict[str, Any] = {
    "orthogonal": {"orthogonal": {"map": "cayley"}},
    "lora": {"lora": {"r": 2, "init_lora_weights": False}},
    "dora": {"dora": {"r": 2}},
    "stiefel": "stiefel",
}
"""Steps that work on whole matrices: each process gathers the tensor of one site."""


SHARDED = "cast centred detach fake_quantize identity interval positive scale shift simplex sphere weight_norm".split()
"""Members that work entry by entry or row by row: they run on the shards."""
OTHERS = {"affine", "conv_spectral_norm", "grassmann", "mask", "quantized_storage", "transpose"}
"""Members that do not go onto the square matrices of this test, or give another dtype."""


def _model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _net()


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).double()


def _spec(chain: Any) -> dict[str, Any]:
    return {"reparam": 1, "rules": [{"name": "r", "select": "*.weight", "chain": [chain]}]}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _of_first(tensor: Tensor) -> Tensor:
    """The tensor that the first process has."""
    found = _whole(tensor).detach().clone()
    dist.broadcast(found, 0)
    return found


def _distributed_before(mesh: Any, x: Tensor) -> None:
    for chain in (*CHAINS.values(), *WHOLE.values()):
        for capture in ("graph", "module"):
            torch.manual_seed(dist.get_rank())  # what steps draw must not depend on the process
            model = parallelize_module(_model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
            new = rewrite(model, _spec(chain), capture=capture).eval()
            reference = rewrite(_model(), _spec(chain), capture=capture).eval()
            state = {name: _whole(tensor) for name, tensor in new.state_dict().items()}
            reference.load_state_dict(state)
            result = new(x)
            torch.testing.assert_close(_whole(result), reference(x))
            _whole(result).square().sum().backward()
            reference(x).square().sum().backward()
            for one, other in zip(new.parameters(), reference.parameters(), strict=True):
                assert (one.grad is None) is (other.grad is None) is (not one.requires_grad)
                if one.grad is not None:
                    torch.testing.assert_close(_whole(one.grad), other.grad)
                torch.testing.assert_close(_of_first(one), _whole(one))
            again = rewrite(model, _spec(chain), capture=capture).eval()
            again.load_state_dict(new.state_dict())
            torch.testing.assert_close(_whole(again(x)), _whole(result))
            baked = bake(new)
            for name, parameter in baked.named_parameters():
                assert parameter.placements == model.get_parameter(name).placements  # type: ignore[attr-defined]
            torch.testing.assert_close(_whole(baked(x)), _whole(result))


def _each_member(mesh: Any) -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()
    for name in [name for name in members() if name not in OTHERS]:
        arguments = {"dtype": "float64"} if name == "cast" else STEPS.get(name, {})
        rule = {"name": "r", "select": "*.weight", "chain": [{name: arguments}]}
        if name in ("gl_plus", "hurwitz_stable", "sl"):  # their right inverses want a value of the space
            rule["init"] = "sample"
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
        reference = rewrite(plain, {"reparam": 1, "rules": [rule]}).eval()
        torch.manual_seed(dist.get_rank())
        model = parallelize_module(plain, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        new = rewrite(model, {"reparam": 1, "rules": [rule]}).eval()
        reference.load_state_dict({key: _whole(tensor) for key, tensor in new.state_dict().items()})
        for one, other in zip(new.state_dict().values(), reference.state_dict().values(), strict=True):
            torch.testing.assert_close(_of_first(one), other, msg=name)
        result, expected = _whole(new(x)), reference(x)
        torch.testing.assert_close(result, expected, msg=name)
        if result.requires_grad:
            result.square().sum().backward()
            expected.square().sum().backward()
        for one, other in zip(new.parameters(), reference.parameters(), strict=True):
            assert (one.grad is None) is (other.grad is None), name
            if one.grad is not None:
                torch.testing.assert_close(_whole(one.grad), other.grad, msg=name)
        gathers = {site.spec.gather for site in new.modules() if isinstance(site, Site)}
        assert name not in SHARDED or gathers == {False}, name
        torch.testing.assert_close(_whole(bake(new)(x)), result, msg=name)


def _distributed_after(mesh: Any, x: Tensor, rank: int) -> None:
    for chain in (*CHAINS.values(), "weight_norm", {"orthogonal": {"map": "cayley"}}):
        for capture in ("graph", "module"):
            torch.manual_seed(0)
            new = rewrite(_model(), _spec(chain), capture=capture)
            reference = copy.deepcopy(new)
            fully_shard(new, mesh=mesh)
            new(x[rank : rank + 1]).square().sum().backward()
            reference(x[:2]).square().sum().div(2).backward()
            for one, other in zip(new.parameters(), reference.parameters(), strict=True):
                assert one.grad is not None and other.grad is not None
                torch.testing.assert_close(_whole(one.grad), other.grad)


def _distribute(rank: int, folder: str) -> None:
    with joined(rank, folder, 2):
        mesh = init_device_mesh("cpu", (2,))
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
        _distributed_before(mesh, x)
        _distributed_after(mesh, x, rank)
        (Path(folder) / f"done{rank}").touch()


def _members(rank: int, folder: str) -> None:
    with joined(rank, folder, 2):
        _each_member(init_device_mesh("cpu", (2,)))
        (Path(folder) / f"done{rank}").touch()


@pytest.mark.slow
@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo"
)
@pytest.mark.parametrize("worker", [_distribute, _members], ids=lambda worker: worker.__name__[1:])
def test_outputs_gradients_and_placements_over_two_processes(worker: Any, tmp_path: Path) -> None:
    run_processes(worker, tmp_path, 2)
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}


if __name__ == "__main__":
    work(globals())
