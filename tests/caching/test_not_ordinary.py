"""The quick way to a value is for plain execution: where anything else is going on, the chain is evaluated for that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from rewriter import rewrite


class Multiplies(nn.Module):
    """A product of matrices, which autocast would do in a lower precision."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("left", torch.randn(size, size))

    def forward(self, X: Tensor) -> Tensor:
        return self.left @ X


def test_under_autocast_a_chain_runs_in_the_precision_of_its_tensors(capture: str, spec: Any) -> None:
    plain = nn.Sequential(nn.Linear(8, 8))
    model: Any = rewrite(plain, spec("0.weight", Multiplies(8), init="raw"), capture=capture)
    site = model.get_submodule("0.parametrizations.weight")
    values: list[Tensor] = []
    site.register_forward_hook(lambda module, args, value: values.append(value))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 8))
    (value,) = values
    torch.testing.assert_close(value, site.steps[0].left @ site.original, rtol=1e-6, atol=1e-6)


def _by_jit(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    traced: Any = torch.jit.trace(model, x)
    traced.get_submodule("cell.parametrizations.weight_hh").original.mul_(2)
    return traced


def _by_make_fx(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    run = make_fx(lambda given, x: torch.func.functional_call(model, given, (x,)))(tensors, x)
    doubled = {name: 2 * tensor if name.endswith("original") else tensor for name, tensor in tensors.items()}
    return lambda x: run(doubled, x)


def _by_export(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    program: Any = torch.export.export(model, (x,), strict=False)
    module = program.module()
    name = next(name for name in program.state_dict if name.endswith("original"))
    module.get_parameter(name).mul_(2)
    return module


@pytest.mark.parametrize("record", [_by_jit, _by_make_fx, _by_export], ids=lambda record: record.__name__.strip("_"))
def test_what_records_a_forward_records_the_chain_and_no_cached_value(
    recurrent: Any, record: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
) -> None:
    made = recurrent(cache="version")
    with torch.no_grad():
        made.model(made.x)
        assert made.evaluations() == 0
        doubled = copy.deepcopy(made.model)
        doubled.get_submodule("cell.parametrizations.weight_hh").original.mul_(2)
        recorded = record(made.model, made.x)
        torch.testing.assert_close(recorded(made.x), doubled(made.x))


class Regions(nn.Module):
    """One layer in four regions that run again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = checkpoint(self.layer, x, use_reentrant=False)
        return x


class Noted(nn.Module):
    """A function of its tensor alone, counted."""

    calls: ClassVar[list[None]] = []

    def forward(self, X: Tensor) -> Tensor:
        Noted.calls.append(None)
        return torch.sin(X)


def test_regions_that_run_again_find_the_value_of_their_forward(spec: Any) -> None:
    model = rewrite(Regions(), spec("layer.0.weight", Noted(), init="raw"), capture="module")
    Noted.calls.clear()
    loss = model(torch.randn(2, 4)).sum()
    assert len(Noted.calls) == 1
    loss.backward()
    assert len(Noted.calls) == 1
