from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter import chain
from rewriter.errors import RewriterError
from rewriter.testing import on_space


class Double(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return 2 * X

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / 2


class Positive(nn.Module):
    """Counts its evaluations; refuses values that are not positive."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.count: Tensor

    def forward(self, X: Tensor) -> Tensor:
        self.count += 1
        return X.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        if not (value > 0).all():
            raise ValueError("not positive")
        return value.log()


def _rotation() -> Tensor:
    return torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q


@pytest.mark.parametrize("arguments", [{"map": "cayley"}, {"map": "householder"}, {"map": "matrix_exp"}])
def test_orthogonal_values_alone_are_on_the_space(arguments: dict[str, str]) -> None:
    Q = _rotation()
    assert on_space("orthogonal", Q, arguments=arguments)
    assert not on_space("orthogonal", 1.01 * Q, arguments=arguments)


def test_a_chain_is_inverted_step_by_step() -> None:
    assert on_space(chain(Positive(), Double()), torch.rand(3) + 0.1)
    assert not on_space(chain(Positive(), Double()), torch.tensor([1.0, -1.0]))


def test_a_class_is_built_for_the_value() -> None:
    assert on_space(Double, torch.randn(2, 3))


def test_the_tolerance_is_relative_to_the_size_of_the_value() -> None:
    symmetric = 1e6 * torch.ones(2, 2, dtype=torch.float64)
    nearly = symmetric + torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert not on_space("symmetric", nearly)
    assert on_space("symmetric", nearly, tolerance=1e-5)


def test_a_value_with_nan_is_not_on_the_space() -> None:
    assert not on_space(Double(), torch.tensor([1.0, torch.nan]))


def test_another_dtype_is_another_space() -> None:
    class Single(Double):
        def forward(self, X: Tensor) -> Tensor:
            return 2 * X.float()

    assert not on_space(Single(), torch.ones(2, dtype=torch.float64))


def test_the_step_and_the_random_state_stay_as_they_were() -> None:
    step, state = Positive(), torch.get_rng_state()
    assert on_space(step, torch.ones(2))
    assert on_space("fixed_rank", torch.ones(3, 3), arguments={"rank": 1})
    assert step.count == 0 and step.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("step", [nn.Tanh(), chain(Double(), nn.Tanh())], ids=["step", "chain"])
def test_a_step_without_right_inverse_is_an_error(step: nn.Module) -> None:
    with pytest.raises(RewriterError, match="Tanh has no right_inverse"):
        on_space(step, torch.zeros(2))
