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

shapes = st.sampled_from([(4, 8), (2, 3, 4), (3, 4, 2, 2)])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
layouts: Any = st.sampled_from(
    [
        {},
        {"scheme": "per_channel"},
        {"scheme": "per_channel", "axis": 1},
        {"scheme": "per_group", "group_size": 2},
        {"scheme": "per_group", "group_size": 1, "axis": 0},
    ]
)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def make(name: str, weight: Tensor, **arguments: Any) -> Any:
    return construct(find(name), weight, arguments)


def groups(value: Tensor, scheme: str = "per_tensor", axis: int | None = None, group_size: int = 0) -> Tensor:
    """The entries that share a scale, as the rows of a matrix."""
    if scheme == "per_tensor":
        return value.reshape(1, -1)
    if scheme == "per_channel":
        return value.movedim(axis or 0, 0).flatten(1)
    return value.movedim(-1 if axis is None else axis, -1).reshape(-1, group_size)


@given(shape=shapes, dtype=dtypes, bits=st.integers(2, 8), layout=layouts, symmetric=st.booleans())
def test_values_are_few_and_stay_when_quantized_again(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int, layout: dict[str, Any], symmetric: bool
) -> None:
    weight = torch.randn(shape).to(dtype)
    step = make("fake_quantize", weight, bits=bits, symmetric=symmetric, **layout)
    value = step(weight)
    assert value.dtype == dtype
    assert value.shape == weight.shape
    for row in groups(value, **layout):
        assert len(row.unique()) <= 2**bits
    torch.testing.assert_close(step(step.right_inverse(value)), value, rtol=0.02, atol=TOLERANCE[dtype])
    spread = groups(weight, **layout).abs().amax(1) * (1 if symmetric else 2)
    error = groups((value - weight).abs(), **layout).amax(1)
    assert (error <= spread * (1.02 / (2 ** (bits - 1) - 1) / (2 if symmetric else 1)) + TOLERANCE[dtype]).all()


@given(bits=st.integers(2, 8), channel=st.booleans(), symmetric=st.booleans())
def test_equals_torch_with_the_same_steps(bits: int, channel: bool, symmetric: bool) -> None:
    weight = torch.randn(4, 6)
    scheme = "per_channel" if channel else "per_tensor"
    value = make("fake_quantize", weight, bits=bits, symmetric=symmetric, scheme=scheme)(weight)
    dims = [1] if channel else [0, 1]
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    if symmetric:
        scale = weight.abs().amax(dims) / high
        zero = torch.zeros_like(scale, dtype=torch.int32)
    else:
        lowest, highest = weight.amin(dims).clamp_max(0), weight.amax(dims).clamp_min(0)
        scale = (highest - lowest) / high
        zero = torch.round(-lowest / scale).to(torch.int32)
    if channel:
        expected = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, low, high)
    else:
        expected = torch.fake_quantize_per_tensor_affine(weight, scale, zero, low, high)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@given(layout=layouts, symmetric=st.booleans())
def test_the_gradient_passes_straight_through(layout: dict[str, Any], symmetric: bool) -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    upstream = torch.randn(4, 8)
    for step in (
        make("fake_quantize", weight, bits=3, symmetric=symmetric, **layout),
        make("ternary", weight, **layout),
    ):
        assert torch.equal(torch.autograd.grad(step(weight), weight, upstream)[0], upstream)


@given(bits=st.integers(2, 6), seed=st.integers(0, 99))
def test_the_learned_step_has_the_gradients_of_the_paper(bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    quantize = make("fake_quantize", weight, bits=bits, step="learned")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    s = quantize.step_size.detach()
    torch.testing.assert_close(s.flatten()[0], 2 * weight.detach().abs().mean() / high**0.5)
    value, upstream = quantize(weight), torch.randn(4, 8, dtype=torch.float64)
    scaled = weight.detach() / s
    torch.testing.assert_close(value, scaled.clamp(low, high).round() * s)
    to_weight, to_step = torch.autograd.grad(value, [weight, quantize.step_size], upstream)
    inside = (scaled > low) & (scaled < high)
    torch.testing.assert_close(to_weight, upstream * inside)
    per_entry = torch.where(inside, scaled.round() - scaled, scaled.clamp(low, high))
    torch.testing.assert_close(to_step.sum(), (upstream * per_entry).sum() / (32 * high) ** 0.5)
    torch.testing.assert_close(quantize(value), value)


@given(shape=shapes, dtype=dtypes, layout=layouts)
def test_binary_and_ternary_values(shape: tuple[int, ...], dtype: torch.dtype, layout: dict[str, Any]) -> None:
    weight = torch.randn(shape).to(dtype)
    layout = {"scheme": "per_tensor", **layout}
    wide = groups(weight.double(), **layout)
    magnitude = wide.abs().mean(1, keepdim=True)
    large = wide.abs() > 0.7 * magnitude
    other = (wide.abs() * large).sum(1, keepdim=True) / large.sum(1, keepdim=True).clamp_min(1)
    for name, expected in [("binary", wide.sign() * magnitude), ("ternary", wide.sign() * large * other)]:
        step = make(name, weight, **layout)
        value = step(weight)
        assert value.dtype == dtype
        if name == "binary" or not (wide.abs() - 0.7 * magnitude).abs().lt(1e-3).any():
            torch.testing.assert_close(
                groups(value.double(), **layout), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )
        again = step(step.right_inverse(value))
        torch.testing.assert_close(again, value, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_binary_has_the_gradient_written_by_hand() -> None:
    weight = (torch.randn(3, 5, dtype=torch.float64) * 1.5).requires_grad_()
    upstream = torch.randn(3, 5, dtype=torch.float64)
    found = torch.autograd.grad(make("binary", weight)(weight), weight, upstream)[0]
    W = weight.detach()
    through_sign = upstream * W.abs().mean(1, keepdim=True) * (W.abs() <= 1)
    through_mean = W.sign() * (upstream * W.sign()).mean(1, keepdim=True)
    torch.testing.assert_close(found, through_sign + through_mean)


@given(shape=shapes, dtype=dtypes, bits=st.integers(2, 8), layout=layouts)
def test_storage_is_int8_and_within_half_a_step(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int, layout: dict[str, Any]
) -> None:
    weight = torch.randn(shape).to(dtype)
    step = make("quantized_storage", torch.zeros(shape, dtype=dtype), bits=bits, **{"scheme": "per_tensor", **layout})
    codes = step.right_inverse(weight)
    assert codes.dtype == step.storage_dtype == torch.int8
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    value = step(codes)
    assert value.dtype == dtype
    half_a_step = groups(weight.float(), **layout).abs().amax(1) / (2 ** (bits - 1) - 1) / 2
    error = groups((value - weight).float().abs(), **layout).amax(1)
    assert (error <= half_a_step * 1.01 + 2 * TOLERANCE[dtype]).all()
    assert torch.equal(step.right_inverse(value), codes)


def test_quantized_storage_says_that_it_is_not_trained() -> None:
    factory: Any = find("quantized_storage")
    assert factory.freezes_original is True
    assert "not trainable" in factory.guarantee


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("fake_quantize", {"bits": 4}), ("fake_quantize", {"step": "learned"}), ("binary", {}), ("ternary", {})],
)
def test_training_keeps_the_values_few(name: str, arguments: dict[str, Any]) -> None:
    layer = nn.Linear(8, 6)
    parametrize.register_parametrization(layer, "weight", make(name, layer.weight, **arguments))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    start = layer.parametrizations.weight.original.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(layer.parametrizations.weight.original, start)
    limit = {"binary": 2 * 6, "ternary": 3}.get(name, 2 ** arguments.get("bits", 8))
    assert len(layer.weight.unique()) <= limit


@pytest.mark.parametrize("name", ["fake_quantize", "binary", "ternary", "quantized_storage"])
def test_a_weight_of_zeros_is_kept(name: str) -> None:
    weight = torch.zeros(4, 8)
    step = make(name, weight)
    assert torch.equal(step(step.right_inverse(weight)), weight)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("fake_quantize", {"bits": 1}, "there is `binary`"),
        ("fake_quantize", {"step": "learned", "symmetric": False}, "symmetric grid only"),
        ("fake_quantize", {"scheme": "per_group"}, "group_size goes with"),
        ("fake_quantize", {"group_size": 2}, "group_size goes with"),
        ("fake_quantize", {"scheme": "per_group", "group_size": 3}, "3 does not divide axis -1"),
        ("fake_quantize", {"axis": 1}, "an axis goes with"),
        ("binary", {"axis": 2}, "axis 2 is none"),
        ("ternary", {"threshold": 1.0}, r"in \[0, 1\), not 1.0"),
        ("quantized_storage", {"bits": 9}, "2 to 8 bits, not 9"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RewriterError, match=message):
        make(name, torch.randn(4, 8), **arguments)


def test_a_vector_has_no_channels() -> None:
    with pytest.raises(RewriterError, match="two or more dimensions, not 1; use per_tensor"):
        make("binary", torch.randn(5))
