"""After any sequence of what people do to a model, the next forward and backward are those of the chains by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import evaluate_once, rewrite
from rewriter.state import freeze, get_value, invalidate, set_value, unfreeze
from tests.maps import Smooth

KERNEL, HEAD, MIX = "cell.weight_hh", "head.weight", "mix.weight"


class Warp(Smooth):
    """Another map in train mode."""

    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X) + (0.125 if self.training else 0.0)


class Net(nn.Module):
    """A recurrent kernel, a weight that two layers share, and one that is computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(4, 5)
        self.head = nn.Linear(5, 5)
        self.tail = nn.Linear(5, 5, bias=False)
        self.mix = nn.Linear(5, 5)
        self.tail.weight = self.head.weight

    def forward(self, x: Tensor, offset: Any = 0.0) -> Tensor:
        h = x.new_zeros(x.size(0), 5)
        for t in range(3):
            h = self.cell(x[:, t], h)
        h = torch.tanh(self.head(h) + offset)
        return self.mix(torch.tanh(self.tail(h)))


class World:
    """A rewritten model, with the values that are frozen in it."""

    def __init__(self, capture: str, policies: tuple[str, str, str]) -> None:
        chains = ([Warp()], ["symmetric", Warp()], [{"affine": {"b": 0.5, "inputs": [HEAD]}}])
        rules = [
            {"name": name.replace(".", "-"), "select": name, "chain": chain, "cache": policy, "init": "raw"}
            for name, chain, policy in zip((KERNEL, HEAD, MIX), chains, policies, strict=True)
        ]
        torch.manual_seed(0)
        self.plain = Net().double()
        self.model = rewrite(self.plain, {"reparam": 1, "rules": rules}, capture=capture)
        self.x = torch.randn(2, 3, 4, dtype=torch.float64)
        self.frozen: dict[str, Tensor] = {}

    def site(self, name: str) -> Any:
        return self.model.get_submodule(name.replace(".", ".parametrizations."))

    def warp(self, name: str) -> Warp:
        return self.site(name).steps[-1]

    def values(self, frozen: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The values of the sites, from what the model stores now."""
        frozen = self.frozen if frozen is None else frozen
        kernel, head, mix = (self.site(name).original for name in (KERNEL, HEAD, MIX))
        found = dict(frozen)
        if KERNEL not in found:
            found[KERNEL] = self.warp(KERNEL)(kernel)
        if HEAD not in found:
            found[HEAD] = self.warp(HEAD)(head.triu() + head.triu(1).mT)
        if MIX not in found:
            found[MIX] = mix + 0.5 * found[HEAD]
        return found

    def thaw(self, *names: str) -> None:
        """Frozen values are evaluated again."""
        modes = {name: self.site(name).training for name in self.frozen}
        for name in modes:
            self.site(name).eval()
        kept = {name: value for name, value in self.frozen.items() if name not in names}
        with torch.no_grad():
            fresh = self.values(kept)
        self.frozen = {name: fresh[name].clone() for name in self.frozen}
        for name, mode in modes.items():
            self.site(name).train(mode)

    def expected(self) -> Tensor:
        values = self.values()
        values["tail.weight"] = values[HEAD]
        plain = copy.deepcopy(self.plain).to(self.x.dtype)
        own = dict(self.model.named_parameters())
        values |= {name: own[name] for name, _ in plain.named_parameters() if name in own}
        return torch.func.functional_call(plain, values, (self.x,), tie_weights=False)

    def check(self) -> None:
        with torch.no_grad():
            expected = self.expected()
            for _ in range(3):  # after which a graph looks at its kept values in one go
                torch.testing.assert_close(self.model(self.x), expected)
        for name, value in self.values().items() if not self.model.training else ():
            torch.testing.assert_close(get_value(self.model, name), value)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if trained:
            loss = self.model(self.x).square().sum()
            wanted = torch.autograd.grad(self.expected().square().sum(), trained, allow_unused=True)
            torch.testing.assert_close(torch.autograd.grad(loss, trained, allow_unused=True), wanted)


def _step(world: World, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    trained = [parameter for parameter in world.model.parameters() if parameter.requires_grad]
    if not trained:
        return
    made = optimizer(trained, lr=0.01)
    world.model(world.x).square().sum().backward()
    made.step()
    made.zero_grad()


def _micro_batches(world: World) -> None:
    with evaluate_once(world.model):
        for x in world.x:
            loss = world.model(x[None]).square().sum()
            if loss.requires_grad:
                loss.backward()
    trained = [parameter for parameter in world.model.parameters() if parameter.requires_grad]
    if trained:
        wanted = torch.autograd.grad(world.expected().square().sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, wanted, strict=True):
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient)
    world.model.zero_grad()


@torch.no_grad()
def _write(world: World) -> None:
    for name in (KERNEL, HEAD, MIX):
        world.site(name).original.mul_(1.1)


@torch.no_grad()
def _write_unseen(world: World) -> None:
    for name in (KERNEL, HEAD, MIX):
        world.site(name).original.data.mul_(0.9)
    invalidate(world.model)
    world.thaw(*world.frozen)


@torch.no_grad()
def _write_to_steps(world: World) -> None:
    world.warp(KERNEL).scale.add_(0.1)
    world.warp(HEAD).shift.sub_(0.1)


def _set(world: World) -> None:
    world.warp(KERNEL).power += 0.5
    world.warp(HEAD).power -= 0.5


def _swap(world: World) -> None:
    site = world.site(HEAD)
    if HEAD not in world.frozen:
        site.original = nn.Parameter(site.original.detach() + 0.2, requires_grad=site.original.requires_grad)


def _swap_in_step(world: World) -> None:
    warp = world.warp(KERNEL)
    warp.shift = warp.shift + 0.1


def _set_value(world: World) -> None:
    with torch.no_grad():
        value = world.values({HEAD: world.frozen[HEAD]} if HEAD in world.frozen else {})[HEAD]
    set_value(world.model, MIX, value + torch.eye(5, dtype=value.dtype))
    world.thaw(MIX)


def _load(world: World, assign: bool) -> None:
    state = {name: value.clone() * 1.05 for name, value in world.model.state_dict().items()}
    for one, other in (("tail", "head"),):
        for name in [name for name in state if name.startswith(f"{one}.parametrizations")]:
            state[name] = state[name.replace(one, other, 1)]
    world.model.load_state_dict(state, assign=assign)
    world.thaw(*world.frozen)


def _convert(world: World) -> None:
    dtype = torch.float32 if world.x.dtype is torch.float64 else torch.float64
    world.model.to(dtype)
    world.x = world.x.to(dtype)
    world.frozen = {name: value.to(dtype) for name, value in world.frozen.items()}
    world.thaw(*world.frozen)


def _convert_by_swapping(world: World) -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        _convert(world)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _hook(world: World) -> None:
    """Halve what the kernel's step is given, for the rest of the sequence."""
    world.warp(KERNEL).register_forward_pre_hook(_halved)


def _halved(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] / 2,)


def _replace_step(world: World) -> None:
    other = copy.deepcopy(world.warp(HEAD))
    other.power += 1.0
    world.site(HEAD)._modules["1"] = other


def _abandoned(world: World) -> None:
    """An `evaluate_once` that an exception ends, with another one inside."""
    with pytest.raises(KeyError), evaluate_once(world.model):
        loss = world.model(world.x).square().sum()
        if loss.requires_grad:
            loss.backward()
        with evaluate_once(world.model):
            world.model(world.x)
            raise KeyError
    world.model.zero_grad()


def _freeze(world: World, *names: str) -> None:
    fresh = [name for name in names if name not in world.frozen]
    freeze(world.model, only=list(names))
    world.frozen |= dict.fromkeys(fresh, torch.empty(0))
    world.thaw(*fresh)


def _unfreeze(world: World) -> None:
    unfreeze(world.model)
    world.frozen = {}


def _fail(world: World) -> None:
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(RuntimeError, match="size of tensor"):
            world.model(world.x, torch.ones(3))


def _copy(world: World) -> None:
    world.model(world.x)
    world.model = copy.deepcopy(world.model)
    world.thaw(*world.frozen)


def _pickle(world: World) -> None:
    world.model = pickle.loads(pickle.dumps(world.model))
    world.thaw(*world.frozen)


def _in_inference_mode(world: World) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(world.model(world.x), world.expected())


def _under_autocast(world: World) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(world.model(world.x), world.expected())


def _functional_call(world: World) -> None:
    other = {"cell.parametrizations.weight_hh.original": world.site(KERNEL).original.detach() * 3}
    with torch.no_grad():
        got = torch.func.functional_call(world.model, other, (world.x,))
        if KERNEL in world.frozen:
            return
        swapped = copy.deepcopy(world)
        swapped.site(KERNEL).original.mul_(3)
        torch.testing.assert_close(got, swapped.expected())


def _toggle(world: World) -> None:
    for name in (KERNEL, HEAD):
        if name not in world.frozen:
            original = world.site(name).original
            original.requires_grad_(not original.requires_grad)


OPERATIONS: dict[str, Callable[[World], Any]] = {
    "train": lambda world: world.model.train(),
    "eval": lambda world: world.model.eval(),
    "SGD": lambda world: _step(world, torch.optim.SGD),
    "Adam": lambda world: _step(world, torch.optim.Adam),
    "micro-batches": _micro_batches,
    "write": _write,
    "write unseen, invalidate": _write_unseen,
    "write to steps": _write_to_steps,
    "set a step": _set,
    "swap": _swap,
    "swap in a step": _swap_in_step,
    "set_value": _set_value,
    "load": lambda world: _load(world, assign=False),
    "load, assign": lambda world: _load(world, assign=True),
    "convert": _convert,
    "convert by swapping": _convert_by_swapping,
    "hook": _hook,
    "replace a step": _replace_step,
    "abandon": _abandoned,
    "freeze": lambda world: _freeze(world, KERNEL, HEAD, MIX),
    "freeze one": lambda world: _freeze(world, HEAD),
    "unfreeze": _unfreeze,
    "fail": _fail,
    "copy": _copy,
    "pickle": _pickle,
    "inference mode": _in_inference_mode,
    "autocast": _under_autocast,
    "functional_call": _functional_call,
    "requires_grad": _toggle,
}
POLICIES = st.tuples(*[st.sampled_from(["forward", "never", "version"])] * 3)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    capture=st.sampled_from(["graph", "module"]),
    policies=POLICIES,
    names=st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=8),
)
def test_values_and_gradients_are_those_of_the_chains(
    capture: str, policies: tuple[str, str, str], names: list[str]
) -> None:
    world = World(capture, policies)
    world.check()
    for name in names:
        OPERATIONS[name](world)
        world.check()
