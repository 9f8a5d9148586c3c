"""Each right inverse runs once, on the value in the dtype that its step sees; state fits what a step receives."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import PlanError, bake, plan, rewrite
from rewriter.state import get_value
from tests.rules import one_rule

spec = functools.partial(one_rule, select="0.weight")


def one(n: int = 4, m: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, m))


calls: Counter[str] = Counter()


class Counted(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, X: Tensor) -> Tensor:
        return 2 * X

    def right_inverse(self, value: Tensor) -> Tensor:
        calls[self.name] += 1
        return value / 2


STEPS = [Counted("first"), Counted("second"), Counted("third")]
PLANNED = [Counted("first"), {"global_l1": {"amount": 3}}, Counted("third")]


@pytest.mark.parametrize("chain", [STEPS, PLANNED], ids=["plain", "planned"])
@pytest.mark.parametrize("verb", [plan, rewrite])
def test_each_right_inverse_runs_once_for_a_site(verb: Any, chain: list[Any]) -> None:
    calls.clear()
    verb(one(), spec(*chain))
    assert set(calls.values()) == {1}
    assert len(calls) == sum(isinstance(step, Counted) for step in chain)


@pytest.mark.parametrize("shape", [(6, 6), (4, 6), (6, 4)])
@pytest.mark.parametrize("map", ["cayley", "matrix_exp", "householder"])
def test_a_cast_weight_is_orthogonal_in_the_wide_dtype(map: str, shape: tuple[int, int]) -> None:
    model = one(*shape)
    new = rewrite(model, spec({"cast": {"dtype": "float64"}}, {"orthogonal": {"map": map}}, unsafe=True))
    Q = get_value(new, "0.weight")
    gram = Q @ Q.mT if Q.shape[0] <= Q.shape[1] else Q.mT @ Q
    assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < 1e-12


def largest(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2).max())


NORM = {"spectral_norm": {"n_power_iterations": 3}}


@pytest.mark.parametrize("first", ["triangular", "positive", "symmetric", nn.ReLU(), Counted("x")])
def test_a_power_iteration_starts_from_what_it_receives(first: Any, capture: str) -> None:
    new = rewrite(one(16, 16), spec(first, NORM), capture=capture)
    assert largest(bake(new).get_submodule("0").weight) < 1.1


def test_a_power_iteration_of_another_tensor_starts_from_that_tensor() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Embedding(16, 8), "h": nn.Linear(16, 8, bias=False)})
    rules = spec("transpose", "spectral_norm", select="h.weight", **{"from": "e.weight"})
    assert largest(bake(rewrite(model, rules, capture="module")).h.weight) < 1.2


def test_power_iterations_of_chunks_start_from_what_they_receive() -> None:
    new = rewrite(one(8, 16), spec("positive", NORM, per={"dim": 0, "chunks": 2}))
    assert largest(bake(new).get_submodule("0").weight.unflatten(0, (2, 8))) < 1.1


def test_a_power_iteration_that_receives_the_weight_is_as_torchs() -> None:
    model, reference = one(5, 7), one(5, 7)
    torch.manual_seed(3)
    new = rewrite(model, spec("spectral_norm"))
    torch.manual_seed(3)
    nn.utils.parametrizations.spectral_norm(reference[0])
    key = "0.parametrizations.weight.0._u"
    torch.testing.assert_close(new.state_dict()[key], reference.state_dict()[key])


class Sub(Tensor):
    """A subclass."""


RETURNED = {
    "bool": lambda w: w.bool(),
    "another float dtype": lambda w: w.double(),
    "integers": lambda w: w.int(),
    "meta": lambda w: w.to("meta"),
    "None": lambda w: None,
    "number": lambda w: 1.0,
    "subclass": lambda w: w.as_subclass(Sub),
    "list with None": lambda w: [w, None],
}


@pytest.mark.parametrize("returned", RETURNED)
@pytest.mark.parametrize("position", [0, 1])
def test_a_right_inverse_that_returns_no_such_tensor_is_refused(returned: str, position: int) -> None:
    class Odd(nn.Module):
        def forward(self, X: Tensor) -> Tensor:
            return X

        def right_inverse(self, value: Tensor) -> Any:
            return RETURNED[returned](value)

    chain: list[Any] = ["identity", "identity"]
    chain[position] = Odd()
    with pytest.raises(PlanError, match=rf"step {position + 1}.*its right inverse returns"):
        rewrite(one(), spec(*chain, unsafe=True))


def test_a_parameter_of_a_step_can_be_computed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.3))
            nn.utils.parametrize.register_parametrization(self, "factor", nn.Softplus(), unsafe=True)

        def forward(self, X: Tensor) -> Tensor:
            return self.factor * X

        def right_inverse(self, value: Tensor) -> Tensor:
            return value.detach() / self.factor.detach()

    model, x = one(), torch.randn(2, 4)
    for capture in ("graph", "module"):
        new = rewrite(model, spec(Scaled()), capture=capture)
        torch.testing.assert_close(new(x), model(x))
        new(x).sum().backward()
        key = "0.parametrizations.weight.0.parametrizations.factor.original"
        assert new.get_parameter(key).grad is not None
        torch.testing.assert_close(bake(new)(x), model(x))
