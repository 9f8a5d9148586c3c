"""Checkpointed regions of models that keep their class."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewriter import RewriterError
from tests.module_mode import Count, Step, rewritten


class Blocks(nn.Module):
    """Three blocks in checkpoints, with a weight that is read outside of them first, time and again."""

    def __init__(self, reentrant: bool | None, outside: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Step() for _ in range(3))
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.reentrant = reentrant
        self.outside = outside

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        x = nn.functional.dropout(block(block(x)) @ self.weight, 0.3)
        return x + nn.functional.dropout(x, 0.3) if x.sum() < 1e9 else x

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight @ self.weight @ self.weight if self.outside else x
        for block in self.blocks:
            if self.reentrant is None:
                x = self.run(block, x)
            else:
                x = checkpoint(self.run, block, x, use_reentrant=self.reentrant)
        return x


class Noisy(nn.Module):
    """A random mask, in train mode."""

    def forward(self, X: Tensor) -> Tensor:
        return nn.functional.dropout(X, 0.5, self.training)


class Shifted(nn.Module):
    """Another map in train mode, with a buffer that it only reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(0.25, dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        return torch.sin(X) + self.shift * (3 if self.training else 1)


class Averaged(nn.Module):
    """A running mean that advances in train mode, and a random mask; the class says neither."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones((), dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean.lerp(X.detach().abs().mean(), 0.1)
        return nn.functional.dropout(X, 0.3) / self.mean


class Counting(nn.Module):
    """A state that advances whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros((), dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        self.runs += 1
        return X * self.runs.clone()


CHAINS: dict[str, list[Any]] = {
    "plain": [Count()],
    "stateful": ["spectral_norm"],
    "random": [{"weight_dropout": {"p": 0.5}}],
    "random, not declared": [Noisy()],
    "other in train mode": [Shifted()],
    "stateful and random, not declared": [Averaged()],
}


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
def test_checkpointed_regions_run_again_with_the_values_of_their_forward(chain: str, outside: bool, x: Tensor) -> None:
    x.requires_grad_()
    plain = rewritten(Blocks(None, outside).double(), CHAINS[chain])
    again = copy.deepcopy(plain)
    again.reentrant = False
    expected, found = [], []
    for model, grads in ((plain, expected), (again, found)):
        torch.manual_seed(0)
        losses = [model(x.double()).square().sum() for _ in range(2)]  # two forwards, then their backwards
        sum(losses, torch.zeros(())).backward()
        grads += [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name, buffer in plain.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer)


def test_a_checkpointed_region_is_not_evaluated_again(x: Tensor) -> None:
    new = rewritten(Blocks(False))
    new(x).sum().backward()
    assert Count.total == 4


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("chain", ["plain", "stateful", "other in train mode"])
def test_reentrant_checkpoints_give_the_same_gradients(chain: str, outside: bool, x: Tensor) -> None:
    x.requires_grad_()
    plain = rewritten(Blocks(None, outside).double(), CHAINS[chain])
    again = copy.deepcopy(plain)
    again.reentrant = True
    grads = []
    for model in (plain, again):
        torch.manual_seed(0)
        model(x.double()).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-12)
    session = again.__dict__["_reparam_contexts"]
    assert not session._repeated


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("chain", ["random, not declared", "other in train mode", "stateful and random, not declared"])
def test_chains_that_are_evaluated_at_every_use_run_again_as_they_ran(chain: str, reentrant: bool, x: Tensor) -> None:
    class Once(Step):
        """A weight that is used once, in a region of its own."""

        again: bool | None = None

        def forward(self, h: Tensor) -> Tensor:
            h = h * 2 if h.sum() < 1e9 else h
            run = super().forward
            return run(h) if self.again is None else checkpoint(run, h, use_reentrant=self.again)

    plain = rewritten(Once().double(), CHAINS[chain], cache="never")
    again = copy.deepcopy(plain)
    again.again = reentrant
    grads = []
    for model in (plain, again):
        torch.manual_seed(0)
        out = model(x.double().requires_grad_())
        nn.functional.dropout(out, 0.3).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(again.named_buffers()), dict(plain.named_buffers()))


def test_a_state_that_advances_in_evaluation_mode_too_cannot_be_repeated(x: Tensor) -> None:
    new = rewritten(Blocks(True).double(), [Counting()])
    loss = new(x.double().requires_grad_()).sum()
    with pytest.raises(RewriterError, match=r"^weight: a step changes its buffers .* `stateful = True`"):
        loss.backward()


def test_a_reentrant_region_is_evaluated_once_when_it_runs_again(x: Tensor) -> None:
    new = rewritten(Blocks(True))
    new(x.requires_grad_()).sum().backward()
    assert Count.total == 4 + 3 * 2  # the forward; then in each of three regions a block's tensor and the shared one
