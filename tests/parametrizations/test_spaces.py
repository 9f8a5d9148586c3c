"""Members with a space: samples lie in it, `on_space` answers, and weights that do not fit are refused with advice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import PlanError, rewrite
from rewriter.parametrizations._base import Space
from rewriter.parametrizations._linear_spaces import Symmetric
from rewriter.parametrizations._registry import construct, find
from rewriter.parametrizations.maths._checks import OF_MATRICES
from rewriter.testing import on_space
from tests.members import members

NEEDED: dict[str, dict[str, Any]] = {
    "almost_orthogonal": {"radius": 0.2},
    "block_diagonal": {"blocks": 2},
    "interval": {"low": -1.0, "high": 1.0},
    "low_rank": {"rank": 2},
    "fixed_rank": {"rank": 2},
    "kronecker": {"factor_shape": [2, 1]},
}
SHAPES = {"grassmann": (6, 4)}
WITH_SAMPLE = [name for name in members() if hasattr(find(name), "sample")]


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    weight = torch.randn(SHAPES.get(name, (4, 4)), dtype=dtype)
    return construct(find(name), weight, NEEDED.get(name, {}))


def test_every_space_can_be_sampled() -> None:
    expected = {name for name in members() if issubclass(find(name), Space)}  # type: ignore[arg-type]
    assert expected | {"low_rank", "fixed_rank", "kronecker", "hurwitz_stable"} == set(WITH_SAMPLE)


@pytest.mark.parametrize("name", WITH_SAMPLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_sample_is_on_its_space(name: str, dtype: torch.dtype) -> None:
    step: Any = build(name, dtype)
    before = {key: tensor.clone() for key, tensor in step.state_dict().items()}
    value = step.sample()
    assert value.dtype == dtype
    assert on_space(step, value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in step.state_dict().items())


@pytest.mark.parametrize("name", WITH_SAMPLE)
def test_a_tensor_off_the_space_is_not_on_it(name: str) -> None:
    step = build(name)
    outside = torch.full(SHAPES.get(name, (4, 4)), -3.0, dtype=torch.float64)
    outside[0, 1], outside[1, 0], outside[2, 1], outside[2, 2] = 40.0, 7.0, 90.0, 2.5
    if name == "gl_plus":
        outside = torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64))
    assert not on_space(step, outside)
    assert not on_space(step, torch.full_like(outside, torch.nan))


def test_a_step_may_say_itself_what_its_values_are() -> None:
    class Even(nn.Module):
        def forward(self, X: Tensor) -> Tensor:
            return 2 * X.round()

        def contains(self, tensor: Tensor, tolerance: float) -> bool:
            return bool(((tensor / 2 - (tensor / 2).round()).abs() <= tolerance).all())

    assert on_space(Even(), torch.tensor([4.0]))
    assert not on_space(Even(), torch.tensor([3.0]))


@pytest.mark.parametrize("name", ["spectral_norm", "orthogonal", "stiefel", "triangular", "spd", "low_rank"])
def test_a_bias_is_refused_with_the_selector_that_leaves_it_out(name: str) -> None:
    spec = {
        "reparam": 1,
        "rules": [{"name": "r", "select": {"module": "torch.nn.Linear"}, "chain": [{name: NEEDED.get(name, {})}]}],
    }
    with pytest.raises(PlanError, match=r"shape \[4\]; leave biases .* `tensor: weight`"):
        rewrite(nn.Sequential(nn.Linear(4, 4)), spec)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.ConvTranspose1d])
def test_a_kernel_of_three_dimensions_is_no_stack_of_matrices(conv: type[nn.Module]) -> None:
    rule = {"name": "r", "select": "0.weight", "chain": ["orthogonal"]}
    model = nn.Sequential(conv(4, 4, 3))
    with pytest.raises(PlanError, match=r"`reshape: \[out, -1\]` .* `reshape: \[-1, 4, 3\]`"):
        rewrite(model, {"reparam": 1, "rules": [rule]})
    with pytest.raises(PlanError, match=r"`reshape: \[out, -1\]`"):
        rewrite(model, {"reparam": 1, "rules": [{**rule, "per": {"dim": 0, "chunks": 2}}]})
    asked = rewrite(model, {"reparam": 1, "rules": [{**rule, "reshape": [-1, 4, 3]}]})
    slices = rewriter.state.get_value(asked, "0.weight")
    torch.testing.assert_close(slices.mT @ slices, torch.eye(3).expand(4, 3, 3), atol=1e-5, rtol=0)


def test_a_stack_of_matrices_that_is_no_kernel_needs_no_reshape() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(2, 4, 3, generator=torch.manual_seed(0)))
    new = rewrite(model, {"reparam": 1, "rules": [{"name": "r", "select": "experts", "chain": ["orthogonal"]}]})
    value = rewriter.state.get_value(new, "experts")
    torch.testing.assert_close(value.mT @ value, torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)


def test_four_dimensions_of_no_kernel_are_reshaped_too() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0)))
    rule = {"name": "r", "select": "experts", "chain": ["symmetric"]}
    told_to = r"use `reshape: \[out, -1\]` for one matrix, or `reshape: \[-1, 4, 4\]`"
    with pytest.raises(PlanError, match=told_to) as told:
        rewrite(model, {"reparam": 1, "rules": [rule]})
    assert "kernel" not in str(told.value)
    new = rewrite(model, {"reparam": 1, "rules": [{**rule, "reshape": [-1, 4, 4]}]})
    value = rewriter.state.get_value(new, "experts")
    torch.testing.assert_close(value, value.mT)


@pytest.mark.parametrize(
    "conv", [nn.Conv1d(4, 4, 4), nn.Conv2d(4, 4, 4), nn.ConvTranspose3d(4, 4, 4)], ids=lambda conv: type(conv).__name__
)
@pytest.mark.parametrize("name", [name for name in members() if OF_MATRICES.intersection(find(name).takes)])
def test_a_kernel_is_refused_with_the_two_ways_to_reshape_it(name: str, conv: nn.Module) -> None:
    rule = {"name": "r", "select": "0.weight", "chain": [{name: NEEDED.get(name, {})}], "init": "sample"}
    model = nn.Sequential(conv)
    with pytest.raises(PlanError, match=r"`reshape: \[out, -1\]` .* `reshape: \[-1, 4, 4\]`"):
        rewrite(model, {"reparam": 1, "rules": [rule]})
    if name not in ("grassmann", "hurwitz_stable"):  # one has no square matrices, the other draws no stack of them
        rewrite(model, {"reparam": 1, "rules": [{**rule, "reshape": [-1, 4, 4]}]})


def test_a_step_that_is_given_as_a_module_refuses_kernels_and_vectors_too() -> None:
    for layer, message in [(nn.Conv2d(3, 3, 3), "reshape"), (nn.BatchNorm1d(3), "leave biases")]:
        with pytest.raises(PlanError, match=message):
            rewrite(layer, {"reparam": 1, "rules": [{"name": "r", "select": "weight", "chain": [Symmetric()]}]})


@pytest.mark.parametrize("name", ["skew", "symmetric", "special_orthogonal"])
def test_a_matrix_that_is_not_square_gets_advice_that_works(name: str) -> None:
    model = nn.Sequential(nn.Linear(288, 32))
    rule: dict[str, Any] = {"name": "r", "select": "0.weight", "chain": [name]}
    with pytest.raises(PlanError, match=r"\[32, 288\]; use `per: \{dim: 1, chunks: 9\}`"):
        rewrite(model, {"reparam": 1, "rules": [rule]})
    rewrite(model, {"reparam": 1, "rules": [{**rule, "per": {"dim": 1, "chunks": 9}}]})


def test_spectral_norm_takes_a_kernel_as_torch_does() -> None:
    rule = {"name": "r", "select": "0.weight", "chain": ["spectral_norm"]}
    new = rewrite(nn.Sequential(nn.Conv2d(4, 6, 3)), {"reparam": 1, "rules": [rule]})
    assert new.state_dict()["0.parametrizations.weight.0._v"].shape == (36,)
