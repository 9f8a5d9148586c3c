"""Subclasses of Tensor, among them distributed tensors, stay what they are, or are refused with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.two_tensor import TwoTensor

from rewriter import CaptureError, PlanError, RewriterError, bake, rewrite
from tests.capture.odd import CAPTURES, Product, spec


class Marked(torch.Tensor):
    """A subclass that survives copying."""

    def new_empty(self, *size: Any, **options: Any) -> Tensor:
        return super().new_empty(*size, **options).as_subclass(Marked)


class Uncopiable(torch.Tensor):
    """A subclass that torch cannot copy."""


@CAPTURES
@pytest.mark.parametrize("kind", ["marked", "wrapper"])
def test_tensor_subclasses_stay(kind: str, capture: str) -> None:
    plain_weight, x = torch.randn(4, 4), torch.randn(3, 4)
    weight = plain_weight.as_subclass(Marked) if kind == "marked" else TwoTensor(plain_weight, plain_weight.clone())
    model = Product(w=nn.Parameter(weight))
    new = rewrite(model, spec("w", "symmetric"), capture=capture)
    assert all(isinstance(parameter, type(weight)) for parameter in new.parameters())
    assert isinstance(new.w, type(weight))
    new(x).sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())
    plain = bake(new)
    assert isinstance(plain.w, type(weight))
    assert isinstance(plain.w, nn.Parameter)
    symmetric = (plain_weight + plain_weight.T) / 2
    found = plain(x).a if kind == "wrapper" else plain(x).as_subclass(Tensor)
    torch.testing.assert_close(found, x @ symmetric)


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = Product(w=nn.Parameter(torch.randn(4, 4).as_subclass(Uncopiable)))
    with pytest.raises(CaptureError, match=r"Product cannot be copied.*inplace=True"):
        rewrite(model, spec("w"))
    assert isinstance(rewrite(model, spec("w"), inplace=True).w, Uncopiable)


class Function(nn.Module):
    """Any forward; its right inverse returns the value."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.function = forward

    def forward(self, X: Tensor) -> Any:
        return self.function(X)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


@CAPTURES
@pytest.mark.parametrize("tensor", ["weight", "table"])
@pytest.mark.parametrize(
    ("before", "step", "after"), [(Tensor, lambda x: TwoTensor(x, x), TwoTensor), (TwoTensor, lambda x: x.a, Tensor)]
)
def test_a_step_gives_a_subclass_or_takes_one(capture: str, tensor: str, before: Any, step: Any, after: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_buffer("table", torch.randn(2, 2))
    if before is TwoTensor:
        model._apply(lambda tensor: TwoTensor(tensor, tensor))
    was = getattr(model[0], tensor)
    new = rewrite(model, spec(f"0.{tensor}", Function(step)), capture=capture)
    site = new.get_submodule(f"0.parametrizations.{tensor}")
    assert type(site.original.detach()) is before
    value = getattr(new.get_submodule("0"), tensor)
    assert type(value.detach()) is after
    baked, undone = (getattr(bake(new, keep=keep)[0], tensor) for keep in ("value", "original"))
    assert type(baked.detach()) is after
    assert type(undone.detach()) is before
    for one in (baked, undone):
        assert isinstance(one, nn.Parameter) is (tensor == "weight")
    plain = [one.a if type(one.detach()) is TwoTensor else one for one in (was, value, baked, undone)]
    for one in plain[1:]:
        torch.testing.assert_close(one.detach(), plain[0].detach())


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One process that is a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@CAPTURES
def test_distributed_tensors_stay_distributed(mesh: Any, capture: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    expected = rewrite(model, spec("0.weight", "symmetric"))(x)
    for name, parameter in list(model[0].named_parameters()):
        setattr(model[0], name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    new = rewrite(model, spec("0.weight", "symmetric"), capture=capture)
    result = new(distribute_tensor(x, mesh, [Shard(0)]))
    torch.testing.assert_close(result.full_tensor(), expected)
    result.sum().backward()
    assert all(isinstance(parameter.grad, DTensor) for parameter in new.parameters())
    weight = bake(new).get_submodule("0").weight
    assert isinstance(weight, DTensor)
    assert weight.placements == (Shard(0),)


def test_a_step_on_whole_matrices_gathers_a_distributed_tensor(mesh: Any) -> None:
    model = Product(w=nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)])))
    new = rewrite(model, spec("w", "orthogonal"))
    site = new.get_submodule("parametrizations.w")
    assert site.original.placements == (Shard(0),)
    value = bake(new).w
    assert value.placements == (Shard(0),)
    torch.testing.assert_close(value.full_tensor() @ value.full_tensor().mT, torch.eye(4))


def test_a_step_that_fails_on_whole_matrices_too_says_why(mesh: Any) -> None:
    model = Product(w=nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])))
    with pytest.raises(PlanError, match="square"):
        rewrite(model, spec("w", "spd"))


@CAPTURES
def test_a_model_is_parallelized_before_it_is_rewritten(mesh: Any, capture: str) -> None:
    new = rewrite(nn.Sequential(nn.Linear(4, 4)), spec("0.weight"), capture=capture)
    with pytest.raises(RewriterError, match=r"call parallelize_module first, and rewrite"):
        parallelize_module(new, mesh, {"0": ColwiseParallel()})


@CAPTURES
def test_a_model_is_sharded_after_it_is_rewritten(mesh: Any, capture: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    new = rewrite(model, spec("0.weight"), capture=capture)
    fully_shard(new, mesh=mesh)
    torch.testing.assert_close(new(x), model(x))
    fully_shard(model, mesh=mesh)
    with pytest.raises(PlanError, match=r"0\.weight is sharded by FSDP.*\n.*rewrite the model first"):
        rewrite(model, spec("0.weight"), capture=capture, inplace=True)
    with pytest.raises(RewriterError, match="rewrite the model before it is sharded"):
        rewrite(model, spec("0.weight"))


@CAPTURES
def test_a_sharded_model_is_baked_by_its_full_state_dict(mesh: Any, capture: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    new = rewrite(model, spec("0.weight"), capture=capture)
    with torch.no_grad():
        new.get_parameter("0.parametrizations.weight.original").mul_(2)
    value = bake(new).get_parameter("0.weight")
    fully_shard(new, mesh=mesh)
    whole = rewrite(model, spec("0.weight"), capture=capture)
    whole.load_state_dict(get_model_state_dict(new, options=StateDictOptions(full_state_dict=True)))
    torch.testing.assert_close(bake(whole).get_parameter("0.weight"), value)
