from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import construct, find

batches = st.sampled_from([(), (2,), (2, 3)])
sides = st.integers(1, 6)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def make(name: str, weight: Tensor, **arguments: Any) -> Any:
    return construct(find(name), weight, arguments)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=TOLERANCE[other.dtype], atol=TOLERANCE[other.dtype])


@given(batch=batches, m=sides, n=sides, data=st.data(), dtype=dtypes)
def test_a_value_of_the_rank_is_kept(
    batch: tuple[int, ...], m: int, n: int, data: st.DataObject, dtype: torch.dtype
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    for name in ("low_rank", "fixed_rank"):
        step = make(name, torch.zeros(*batch, m, n, dtype=dtype), rank=rank)
        value = step.sample()
        assert value.dtype == dtype
        assert value.shape == (*batch, m, n)
        factors = step.right_inverse(value)
        assert all(factor.dtype == dtype for factor in factors)
        again = step(*factors)
        assert again.dtype == dtype
        close(again, value)


@given(batch=batches, m=sides, n=sides, data=st.data())
def test_the_right_inverse_gives_the_nearest_matrix_of_the_rank(
    batch: tuple[int, ...], m: int, n: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    weight = torch.randn(*batch, m, n, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    S[..., rank:] = 0
    for name in ("low_rank", "fixed_rank"):
        step = make(name, weight, rank=rank)
        close(step(*step.right_inverse(weight)), (U * S.unsqueeze(-2)) @ Vh)


@given(m=st.integers(2, 6), n=st.integers(2, 6))
def test_the_rank_is_exact_also_for_a_value_of_lower_rank_and_after_training(m: int, n: int) -> None:
    step = make("fixed_rank", torch.zeros(m, n, dtype=torch.float64), rank=2)
    zero = step(*step.right_inverse(torch.zeros(m, n, dtype=torch.float64)))
    assert torch.linalg.matrix_rank(zero) == 2
    factors = [f.add(torch.randn_like(f)).requires_grad_() for f in step.right_inverse(step.sample())]
    optimizer = torch.optim.Adam(factors, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        step(*factors).square().sum().backward()
        optimizer.step()
    assert torch.linalg.matrix_rank(step(*factors)) == 2


def test_low_rank_is_the_product_of_its_factors_and_bounds_the_rank() -> None:
    step, U, V = make("low_rank", torch.zeros(5, 4), rank=2), torch.randn(5, 2), torch.randn(4, 2)
    assert torch.equal(step(U, V), U @ V.T)
    assert torch.linalg.matrix_rank(step(U, V)) == 2


def test_fixed_rank_has_the_singular_values_softplus_of_the_middle_factor() -> None:
    step = make("fixed_rank", torch.zeros(5, 4, dtype=torch.float64), rank=3)
    U, s, V = (torch.randn(n, dtype=torch.float64) for n in [(5, 3), (3,), (4, 3)])
    found = torch.linalg.svdvals(step(U, s, V))[:3]
    torch.testing.assert_close(found, nn.functional.softplus(s).sort(descending=True).values)


@given(
    batch=batches,
    first=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    second=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtype=dtypes,
    data=st.data(),
)
def test_kronecker_keeps_sums_of_products(
    batch: tuple[int, ...],
    first: tuple[int, int],
    second: tuple[int, int],
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    rank = data.draw(st.integers(1, min(first[0] * first[1], second[0] * second[1])))
    weight = torch.zeros(*batch, first[0] * second[0], first[1] * second[1], dtype=dtype)
    step = make("kronecker", weight, factor_shape=list(first), rank=rank)
    A, B = torch.randn(*batch, rank, *first, dtype=dtype), torch.randn(*batch, rank, *second, dtype=dtype)
    value = step(A, B)
    if not batch:
        close(value, sum(torch.kron(a, b) for a, b in zip(A, B, strict=True)))
    close(step(*step.right_inverse(value)), value)
    assert step.sample().shape == weight.shape


def test_kronecker_right_inverse_is_the_nearest_product() -> None:
    weight = torch.randn(4, 6, dtype=torch.float64)
    step = make("kronecker", weight, factor_shape=[2, 3])
    factors = [factor.requires_grad_() for factor in step.right_inverse(weight)]
    distance = (step(*factors) - weight).square().sum()
    for gradient in torch.autograd.grad(distance, factors):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)
    full = make("kronecker", weight, factor_shape=[2, 3], rank=4)
    torch.testing.assert_close(full(*full.right_inverse(weight)), weight)


CASES = [("low_rank", {"rank": 2}), ("fixed_rank", {"rank": 2}), ("kronecker", {"factor_shape": [2, 2]})]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_autocast_does_not_round_the_value(name: str, arguments: dict[str, Any]) -> None:
    weight = torch.randn(4, 6)
    step = make(name, weight, **arguments)
    factors = step.right_inverse(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = step(*factors)
    assert torch.equal(inside, step(*factors))


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_a_batch_is_each_matrix_on_its_own(name: str, arguments: dict[str, Any]) -> None:
    weights = torch.randn(3, 4, 6, dtype=torch.float64)
    together = make(name, weights, **arguments)
    value = together(*together.right_inverse(weights))
    assert together.batched is True
    for one, expected in zip(weights, value, strict=True):
        alone = make(name, one, **arguments)
        torch.testing.assert_close(alone(*alone.right_inverse(one)), expected)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_trains_under_torch_with_its_factors_as_originals(name: str, arguments: dict[str, Any]) -> None:
    layer = nn.Linear(6, 4)
    step = make(name, layer.weight, **arguments)
    parametrize.register_parametrization(layer, "weight", step)
    start = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    layer(torch.randn(3, 6)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, start)
    value = step.sample()
    layer.weight = value
    torch.testing.assert_close(layer.weight, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "message"),
    [
        ("low_rank", {"rank": 5}, (4, 6), r"rank in 1\.\.4, not 5"),
        ("fixed_rank", {"rank": 0}, (4, 6), r"rank in 1\.\.4, not 0"),
        ("low_rank", {"rank": 1}, (4,), "acts on matrices"),
        ("kronecker", {"factor_shape": [3, 2]}, (4, 6), r"\[3, 2\] is no .* that divides 4 x 6"),
        ("kronecker", {"factor_shape": [2, 2], "rank": 5}, (4, 6), r"rank in 1\.\.4, not 5"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, arguments: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(RewriterError, match=message):
        make(name, torch.randn(shape), **arguments)
