"""Models of the benchmarks, and the ways to parametrize them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import rewriter

M = TypeVar("M", bound=nn.Module)

ORTHOGONAL = ("householder", "matrix_exp", "cayley")


class Recurrent(nn.Module):
    """An unrolled RNN: its loop calls the same layer at every step.

    Arguments:
        steps: how many.
        width: size of the state and of the input.
    """

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.steps = steps
        self.input = nn.Linear(width, width)
        self.recurrent = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state for `x` of shape (steps, batch, width)."""
        state = torch.zeros_like(x[0])
        for index in range(self.steps):
            state = torch.tanh(self.input(x[index]) + self.recurrent(state))
        return state


class RecurrentByHand(nn.Module):
    """`Recurrent`, written by hand to evaluate the recurrent weight once and use it in every step.

    Arguments:
        plain: its other tensors are copied.
        chain: computes the weight.
        originals: the inputs of the chain.
    """

    def __init__(self, plain: Recurrent, chain: nn.Module, originals: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps, self.input = plain.steps, copy.deepcopy(plain.input)
        self.chain = copy.deepcopy(chain)
        self.originals = nn.ParameterList(original.detach().clone() for original in originals)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state for `x` of shape (steps, batch, width)."""
        weight = self.chain(*self.originals)
        state = torch.zeros_like(x[0])
        for index in range(self.steps):
            state = torch.tanh(self.input(x[index]) + F.linear(state, weight))
        return state


class Fused(nn.Module):
    """Two layers of nn.LSTM, of which only the outputs are used.

    Arguments:
        width: size of the state and of the input.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's states for `x` of shape (steps, batch, width)."""
        outputs, _ = self.lstm(x)
        return outputs


def spec_of(name: str, select: Any = "**.weight", **options: Any) -> rewriter.Spec:
    """Return a spec of one rule; `name` is a map of the orthogonal group or a parametrization of the catalog."""
    step: Any = {"orthogonal": {"map": name}} if name in ORTHOGONAL else name
    rule = {"name": "weights", "select": select, "chain": [step], **options}
    return rewriter.load_spec({"reparam": 1, "rules": [rule]})


def by_torch(model: nn.Module, name: str, tensors: Sequence[str]) -> nn.Module:
    """Return a copy of `model` with torch's parametrization of this name on the tensors."""
    model = copy.deepcopy(model)
    put = getattr(parametrizations, name, None) or functools.partial(parametrizations.orthogonal, orthogonal_map=name)
    for owner, tensor in _places(model, tensors):
        put(owner, tensor)
    return model


def by_geotorch(model: nn.Module, name: str, tensors: Sequence[str]) -> nn.Module | None:
    """Return a copy of `model` with geotorch's parametrization; None if geotorch has none or is not installed."""
    try:
        import geotorch
    except ImportError:
        return None
    model = copy.deepcopy(model)
    if name not in ("matrix_exp", "cayley"):
        return None
    for owner, tensor in _places(model, tensors):
        triv: Any = {"matrix_exp": "expm", "cayley": "cayley"}[name]
        geotorch.orthogonal(owner, tensor, triv=triv)
    return model


@torch.no_grad()
def as_trained(model: M) -> M:
    """Return `model` with its originals moved a little, the same way in every contender.

    At first the original of a matrix exponential is zero, and its exponential costs almost nothing.
    """
    torch.manual_seed(1)
    for name, stored in model.named_parameters():
        if "parametrizations" in name:
            stored += 0.3 * torch.randn_like(stored) / stored.size(-1) ** 0.5
    return model


def _places(model: nn.Module, tensors: Sequence[str]) -> list[tuple[nn.Module, str]]:
    parts = [name.rpartition(".") for name in tensors]
    return [(model.get_submodule(owner), tensor) for owner, _, tensor in parts]


def training_step(model: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    """Return a function that runs forward and backward of `model`, without gradients at the start."""
    parameters = list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(*inputs).square().mean().backward()

    return step


def under_cached(step: Callable[[], None]) -> Callable[[], None]:
    """Return `step` under `parametrize.cached()`."""

    def run() -> None:
        with parametrize.cached():
            step()

    return run
