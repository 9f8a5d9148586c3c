from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.parametrizations._arithmetic import Affine, Scale, Shift
from rewriter.parametrizations._plumbing import Cast, Detach, Identity, Transpose, WeightDropout
from rewriter.parametrizations._registry import construct, find

shapes = st.lists(st.integers(1, 4), min_size=2, max_size=4)
floats = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
numbers = st.floats(-4, 4).filter(lambda x: abs(x) > 0.1)


@given(shape=shapes, dtype=floats, a=numbers, b=numbers)
def test_values_are_as_written_by_hand(shape: list[int], dtype: torch.dtype, a: float, b: float) -> None:
    X, other = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    expected: list[tuple[Tensor, Tensor]] = [
        (Scale(a)(X), X * a),
        (Shift(b)(X), X + b),
        (Affine(a, b, 0.5)(X, other), a * X + (b * other + 0.5)),
        (Transpose()(X), X.mT),
        (Identity()(X), X),
        (Detach()(X), X),
        (WeightDropout(0.5).eval()(X), X),
    ]
    for value, by_hand in expected:
        assert value.dtype == dtype
        assert torch.equal(value, by_hand)


@pytest.mark.parametrize("arguments", [{}, {"dim0": 0, "dim1": 2}], ids=str)
def test_right_inverse_scripting_and_export_of_transpose(arguments: dict[str, Any]) -> None:
    weight = torch.randn(2, 3, 4)
    step = construct(find("transpose"), weight, arguments).eval()
    value = step(weight)
    X = step.right_inverse(value)
    assert X.shape == weight.shape
    assert X.dtype == weight.dtype
    torch.testing.assert_close(step(X), value)
    assert torch.equal(torch.jit.script(step)(weight), value)
    assert torch.equal(torch.export.export(step, (weight,)).module()(weight), value)


@given(a=numbers, b=numbers, shape=shapes)
def test_affine_is_undone_with_and_without_its_other_tensor(a: float, b: float, shape: list[int]) -> None:
    step, value, other = Affine(a, b, 0.5), torch.randn(shape), torch.randn(shape)
    given_other = step.right_inverse(value, other)
    assert isinstance(given_other, Tensor)
    torch.testing.assert_close(step(given_other, other), value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step(*step.right_inverse(value)), value, rtol=1e-4, atol=1e-4)


@given(a=numbers, b=numbers)
def test_neighbours_merge(a: float, b: float) -> None:
    X = torch.randn(3, 4)
    for first, second in [
        (Scale(a), Scale(b)),
        (Shift(a), Shift(b)),
        (Identity(), Scale(a)),
        (Detach(), Detach()),
    ]:
        merged = first.fuse(second)
        assert merged is not None
        torch.testing.assert_close(merged(X), second(first(X)))
    assert Scale(a).fuse(Shift(b)) is None
    assert Shift(a).fuse(Scale(b)) is None
    assert Detach().fuse(Scale(b)) is None


def test_what_undoes_itself_cancels() -> None:
    assert Transpose().cancels(Transpose(-1, -2))
    assert not Transpose(0, 1).cancels(Transpose(0, 2))
    assert Scale(4.0).cancels(Scale(0.25))
    assert not Scale(4.0).cancels(Scale(0.5))
    assert Shift(2.0).cancels(Shift(-2.0))
    assert not Shift(2.0).cancels(Scale(0.5))


@given(source=floats, middle=floats, last=floats)
def test_casts_merge_and_cancel_only_where_nothing_is_lost(
    source: torch.dtype, middle: torch.dtype, last: torch.dtype
) -> None:
    X = torch.randn(200, dtype=torch.float64).mul(3).exp().to(source)
    first, second = Cast(middle, weight=X), Cast(last)
    both = second(first(X))
    assert torch.equal(first(X), X.to(middle))
    if first.cancels(second):
        assert both.dtype == X.dtype
        assert torch.equal(both, X)
    merged = first.fuse(second)
    if merged is not None:
        assert torch.equal(merged(X), both)
    wider = {torch.float16: torch.float32, torch.bfloat16: torch.float32}.get(source, torch.float64)
    assert Cast(wider, weight=X).cancels(Cast(source))
    assert not Cast(torch.float16, weight=torch.ones(1)).cancels(Cast(torch.float32))


def test_dropout_draws_while_training_and_keeps_the_mean() -> None:
    X, step = torch.ones(100, 100), WeightDropout(0.25)
    value = step(X)
    assert value.unique().tolist() == pytest.approx([0, 4 / 3])
    assert value.mean().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(step(X), value)


def test_detach_stops_the_gradient_and_the_others_pass_it() -> None:
    X = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert not Detach()(X).requires_grad
    for step in (Scale(2.0), Shift(1.0), Transpose(), Identity(), Cast("float64")):
        assert torch.autograd.gradcheck(step, (X,))
    assert torch.autograd.gradcheck(Affine(2.0, 3.0, 1.0), (X, X.detach().clone().requires_grad_()))


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: Scale(0.0).right_inverse(torch.ones(1)), "scale's factor is zero"),
        (lambda: Affine(a=0).right_inverse(torch.ones(1)), "affine's a is zero"),
        (lambda: Cast("int8"), "int8 is none of them"),
        (lambda: Cast("float16", weight=torch.ones(1, dtype=torch.int64)), "int64 is none of them"),
        (lambda: WeightDropout(1.5), "is a probability, not 1.5"),
    ],
)
def test_what_cannot_be_is_refused(attempt: Any, message: str) -> None:
    with pytest.raises(RewriterError, match=message):
        attempt()
