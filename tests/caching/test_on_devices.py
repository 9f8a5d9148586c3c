"""What depends on a device's own generator, streams and graphs; on the GPU too where there is one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewriter import evaluate_once, rewrite
from rewriter.state import get_value

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_a_gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


class Noisy(nn.Module):
    """Draws from the generator of the device that its tensor is on."""

    random = True

    def forward(self, X: Tensor) -> Tensor:
        return X * torch.rand_like(X)


class Region(nn.Module):
    """A layer and a dropout, in a region that runs again in backward."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh())
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False) if self.again else self.layer(x)


@pytest.mark.parametrize("capture", ["auto", "module"])
def test_a_region_that_runs_again_draws_what_it_drew(device: str, capture: str, spec: Any) -> None:
    once = Region(again=False).to(device)
    again = Region(again=True).to(device)
    again.load_state_dict(once.state_dict())
    x = torch.randn(5, 6, device=device)
    gradients = []
    for model in (once, again):
        made = rewrite(model, spec("layer.0.weight", Noisy(), init="raw"), capture=capture)
        torch.manual_seed(7)
        made(x).square().sum().backward()
        gradients.append(made.get_submodule("layer.0.parametrizations.weight").original.grad)
    torch.testing.assert_close(*gradients)


def test_looking_at_a_value_draws_nothing(device: str, spec: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6)).to(device)
    made = rewrite(model, spec("0.weight", Noisy(), init="raw"))
    torch.manual_seed(7)
    expected = torch.rand(3, device=device)
    torch.manual_seed(7)
    get_value(made, "0.weight")
    assert torch.equal(torch.rand(3, device=device), expected)


def test_gradients_gathered_under_autocast_and_a_scaler(device: str, spec: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).to(device)
    made = rewrite(model, spec("0.weight", {"orthogonal": {"map": "cayley"}}))
    apart = copy.deepcopy(made)
    batches = torch.randn(4, 5, 6, device=device)
    scaler = torch.amp.GradScaler(device, init_scale=128.0)

    def run(model: nn.Module) -> list[Tensor]:
        for x in batches:
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(x).square().mean()
            scaler.scale(loss).backward()
        return [parameter.grad for parameter in model.parameters()]

    with evaluate_once(made):
        run(made)
    gathered = [parameter.grad for parameter in made.parameters()]
    torch.testing.assert_close(gathered, run(apart), rtol=2e-2, atol=2e-2 * 128)


@on_a_gpu
@pytest.mark.parametrize("cache", ["forward", "version"])
def test_a_cuda_graph_follows_the_weight(cache: str, spec: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).cuda()
    made = rewrite(model, spec("0.weight", "skew", cache=cache, init="raw"))
    x = torch.randn(5, 6, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            made(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = made(x)
    with torch.no_grad():
        made.get_submodule("0").parametrizations.weight.original.mul_(2)
        graph.replay()
        torch.testing.assert_close(out, copy.deepcopy(made)(x))
        torch.testing.assert_close(out, made(x))


@on_a_gpu
def test_a_value_cached_on_one_stream_is_not_read_on_another(spec: Any) -> None:
    model = nn.Sequential(nn.Linear(512, 512)).cuda()
    made = rewrite(model, spec("0.weight", {"orthogonal": {"map": "matrix_exp"}}, cache="version"))
    x = torch.randn(5, 512, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(side):
            made(x)
        out = made(x)  # while the side stream may still be at work
        torch.cuda.synchronize()
        torch.testing.assert_close(out, copy.deepcopy(made)(x))
