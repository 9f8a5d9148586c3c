"""What one forward reads of a module that keeps its class: once or time and again, under this mode or that."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rewriter import RewriterError, rewrite


class Counting(nn.Module):
    """Doubles, and counts how often."""

    calls: ClassVar[list[bool]] = []
    """For each call, whether gradients were recorded. Of the class: a step that changes keeps no values."""

    def forward(self, X: Tensor) -> Tensor:
        Counting.calls.append(torch.is_grad_enabled())
        return 2 * X

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / 2


def _rewritten(model: nn.Module, cache: str = "forward", select: str = "**.weight*") -> Any:
    spec = {
        "reparam": 1,
        "imports": {"t": __name__},
        "rules": [{"name": "r", "select": select, "cache": cache, "chain": ["t.Counting"]}],
    }
    result: Any = rewrite(model, spec, capture="module")
    Counting.calls.clear()
    return result


class Looks(nn.Module):
    """Reads its weight without gradients first, and then with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = self.linear.weight.norm()
        return self.linear(x) / size


@pytest.mark.parametrize("cache", ["forward", "version"])
def test_a_value_cached_without_gradients_is_not_used_where_they_are_recorded(cache: str) -> None:
    plain = Looks()
    model = _rewritten(plain, cache, "linear.weight")
    x = torch.randn(2, 3)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model(x), expected)
    assert len(Counting.calls) == (1 if cache == "version" else 2)
    value = model(x)
    value.sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(value, expected)
    stored = model.linear.parametrizations.weight.original
    torch.testing.assert_close(stored.grad, 2 * plain.linear.weight.grad)


class Writes(nn.Module):
    """Writes to its buffer, when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(3))
        self.writing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.writing:
            self.weight.add_(1)
        return x * self.weight


def test_a_write_to_a_cached_buffer_is_refused_in_the_forward_that_writes() -> None:
    model = _rewritten(Writes(), "version", "weight")
    x = torch.ones(3)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.writing = True
        with pytest.raises(RewriterError, match="changed weight in place"):
            model(x)
        model.writing = False
        assert torch.equal(model(x), x)


class Twice(nn.Module):
    """Calls one LSTM two times."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.lstm(x)
        second, _ = self.lstm(first)
        return second


@pytest.mark.parametrize(("cache", "count"), [("forward", 1), ("version", 1), ("never", 2)])
def test_an_lstm_that_is_called_twice_evaluates_as_its_policy_says(cache: str, count: int) -> None:
    plain = Twice()  # in each call torch asks for the weights twice
    model = _rewritten(plain, cache)
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(model(x), plain(x))
    assert len(Counting.calls) == 2 * count


def test_an_lstm_alone_is_one_use_of_its_weights() -> None:
    plain = nn.LSTM(3, 3)
    model = _rewritten(plain, "never", "weight_*")
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(model(x)[0], plain(x)[0])
    assert len(Counting.calls) == 2  # for two weights


class Assigns(nn.Module):
    """Assigns to tensors of an LSTM between two calls of it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.lstm(x)
        with torch.no_grad():
            self.lstm.weight_hh_l0 = nn.Parameter(torch.full((12, 3), 0.5))
            self.lstm.bias_hh_l0 = nn.Parameter(torch.full((12,), 0.25))
        second, _ = self.lstm(first)
        return second


def test_what_is_assigned_to_an_lstm_between_two_calls_is_read_by_the_second() -> None:
    plain = Assigns()
    model = _rewritten(plain)
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(model(x), plain(x))


class Region(nn.Module):
    """Calls one LSTM outside and inside of a region that runs again in backward."""

    def __init__(self, reentrant: bool, inside_first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3)
        self.reentrant, self.inside_first = reentrant, inside_first

    def forward(self, x: Tensor) -> Tensor:
        again = lambda x: checkpoint(self.lstm, x, use_reentrant=self.reentrant)[0]  # noqa: E731
        once = lambda x: self.lstm(x)[0]  # noqa: E731
        for part in (again, once, again) if self.inside_first else (once, again, once):
            x = functional.tanh(part(x))
        return x


@pytest.mark.parametrize("inside_first", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_an_lstm_in_a_checkpointed_region_has_the_gradients_of_the_plain_one(
    reentrant: bool, inside_first: bool
) -> None:
    plain = Region(reentrant, inside_first)
    model = _rewritten(plain)
    x = torch.randn(4, 2, 3, requires_grad=True)
    for one in (plain, model):
        one(x).square().sum().backward()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        stored = model.get_submodule(f"lstm.parametrizations.{name}").original
        torch.testing.assert_close(stored.grad, 2 * getattr(plain.lstm, name).grad)
    assert reentrant or Counting.calls == [True, True]


class Reads(nn.Module):
    """Reads two tensors of its own, in one order or the other."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias if self.first == "weight" else self.bias + x * self.weight


class Doubles(nn.Module):
    """Computes two tensors."""

    def forward(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * weight, 2 * bias


@pytest.mark.parametrize("cache", ["forward", "never", "version"])
@pytest.mark.parametrize("first", ["weight", "bias"])
def test_of_tensors_that_are_computed_together_each_reads_as_itself(first: str, cache: str) -> None:
    plain = Reads(first)
    rule = {"name": "r", "select": "0", "joint": ["weight", "bias"], "chain": [Doubles()], "init": "raw"}
    model = rewrite(nn.Sequential(plain), {"reparam": 1, "rules": [{**rule, "cache": cache}]}, capture="module")
    x = torch.randn(2, 3)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(x), x * 2 * plain.weight + 2 * plain.bias)
