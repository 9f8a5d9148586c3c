"""What `torch.fx.symbolic_trace` makes of a model that is rewritten: a graph that computes and trains the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter import CaptureError, PlanError, bake, rewrite
from rewriter.sites import Site
from tests.threads import run_threads


class Cells(nn.Module):
    """An RNN whose input and state are added, an LSTM that is inlined, and layers that are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(4, 4)
        self.step = nn.Linear(4, 4, bias=False)
        self.lstm = nn.LSTM(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.free = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(9):
            state = torch.tanh(self.input(x) + self.step(state))
        outputs, _ = self.lstm(state.unsqueeze(0))
        y: Tensor = outputs.squeeze(0) * scale
        for layer in self.layers:
            y = torch.tanh(layer(y))
        return y @ self.free


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, scale=2.0)
        return y + 1


class Owner(nn.Module):
    """Reads a computed tensor itself."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.free


RULES = [
    {"name": "step", "select": ["step.weight", "lstm.weight_*"], "chain": ["weight_norm"]},
    {"name": "layers", "select": "layers.*.weight", "chain": [{"orthogonal": {"map": "householder"}}]},
    {"name": "free", "select": "free", "chain": [{"orthogonal": {"map": "matrix_exp"}}]},
]


def _rewritten(capture: str = "graph") -> nn.Module:
    torch.manual_seed(0)
    return rewrite(Cells().double(), {"reparam": 1, "rules": RULES}, capture=capture)


def _gradients(model: nn.Module, x: Tensor, names: list[str]) -> list[Tensor]:
    parameters = [model.get_parameter(name) for name in names]
    return list(torch.autograd.grad(model(x).square().sum(), parameters))


@pytest.mark.parametrize("inside", [False, True])
def test_the_graph_computes_and_trains_the_same(inside: bool) -> None:
    model: nn.Module = Outer(_rewritten()) if inside else _rewritten()
    again = fx.symbolic_trace(model)
    names = [name for name, _ in model.named_parameters()]
    assert sorted(name for name, _ in again.named_parameters()) == sorted(names)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(again(x), model(x))
    for ours, theirs in zip(_gradients(again, x, names), _gradients(model, x, names), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(0.9)
    torch.testing.assert_close(again(x), model(x))  # over the same tensors


def test_each_site_is_one_node() -> None:
    model = _rewritten()
    sites = sum(isinstance(module, Site) for module in model.modules())
    nodes = [node for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    assert sum("parametrizations" in str(node.target) for node in nodes) == sites == 8


def test_baking_and_rewriting_it_are_refused() -> None:
    """Baked it would otherwise come back as it is, its chains still in it."""
    again = fx.symbolic_trace(_rewritten())
    rule = {"name": "input", "select": "input.weight", "chain": ["weight_norm"]}
    for change in (bake, lambda model: rewrite(model, {"reparam": 1, "rules": [rule]})):
        with pytest.raises(PlanError, match=r"step.parametrizations.weight computes .*bake the model itself"):
            change(again)
    with pytest.raises(PlanError, match=r"inner.step.parametrizations.weight computes"):
        bake(nn.Sequential(fx.symbolic_trace(Outer(_rewritten()))))


def test_defaults_and_keywords_arrive() -> None:
    class Keywords(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return self.inner(x=x, scale=factor, shift=None) - self.inner(x)

    model = Keywords(_rewritten())
    again, x = fx.symbolic_trace(model), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(again(x, torch.tensor(3.0)), model(x, torch.tensor(3.0)))


def test_tracing_leaves_the_model_alone() -> None:
    model = _rewritten()
    before = set(model.__dict__), model.state_dict().keys()
    fx.symbolic_trace(model)
    assert (set(model.__dict__), model.state_dict().keys()) == before
    assert not any(isinstance(value, Tensor) for module in model.modules() for value in module.__dict__.values())


def test_a_value_that_would_become_a_constant_is_refused() -> None:
    new = rewrite(Owner(), {"reparam": 1, "rules": [RULES[2]]}, capture="module")
    with pytest.raises(CaptureError, match=r"value of free as a constant.*capture='graph'.*bake"):
        fx.symbolic_trace(new)
    x = torch.randn(3, 4)
    assert new(x).requires_grad  # and it runs as before


def test_torchs_layers_stay_nodes_in_module_mode() -> None:
    spec = {"reparam": 1, "rules": [{"name": "w", "select": "**.weight", "chain": ["weight_norm"]}]}
    new = rewrite(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), spec, capture="module")
    again, x = fx.symbolic_trace(new), torch.randn(3, 4)
    torch.testing.assert_close(again(x), new(x))
    assert all(gradient.any() for gradient in _gradients(again, x, [name for name, _ in again.named_parameters()]))


@pytest.mark.parametrize(
    "step",
    ["weight_norm", "spectral_norm", *({"orthogonal": {"map": name}} for name in ("matrix_exp", "cayley"))],
    ids=str,
)
def test_tracing_by_dispatch_sees_the_chain(step: Any) -> None:
    new = rewrite(Owner(), {"reparam": 1, "rules": [{"name": "free", "select": "free", "chain": [step]}]}).eval()
    x = torch.randn(3, 4)
    parameters = dict(new.named_parameters())

    def run(parameters: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(new, parameters, (x,))

    graph = make_fx(run)(parameters, x)
    changed = {name: 1.1 * value + 0.1 for name, value in parameters.items()}
    torch.testing.assert_close(graph(changed, x), run(changed, x))


def test_others_run_while_a_model_is_rewritten() -> None:
    spec = {"reparam": 1, "rules": [{"name": "c", "select": "*.weight", "chain": ["symmetric"]}]}
    running = rewrite(nn.Sequential(nn.Linear(4, 4)), spec, capture="module")
    x = torch.randn(3, 4)

    def rewrite_some() -> None:
        for _ in range(20):
            _rewritten()

    def run_some() -> None:
        for _ in range(200):
            running(x)

    run_threads(rewrite_some, run_some)
