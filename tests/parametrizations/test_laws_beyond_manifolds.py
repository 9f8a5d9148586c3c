"""The laws of `check_parametrization`, for masks, adapters, factors, quantizers and glue."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewriter.parametrizations._registry import construct, find
from rewriter.testing import check_parametrization

ROUNDING = ("gradient", "second gradient")
"""Laws that a straight-through gradient breaks, being no derivative."""

CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("mask", {"mask": torch.eye(4, 6)}, ()),
    ("random_unstructured", {"amount": 0.5}, ()),
    ("l1_unstructured", {"amount": 0.5}, ()),
    ("random_structured", {"amount": 1}, ()),
    ("ln_structured", {"amount": 1}, ()),
    ("global_l1", {"amount": 5}, ()),
    ("global_random", {"amount": 5}, ()),
    ("n_m", {"n": 1, "m": 2}, ()),
    ("block_sparse", {"amount": 2, "block_shape": [2, 3]}, ()),
    ("scale", {"factor": 0.5}, ()),
    ("shift", {"offset": 0.5}, ()),
    ("affine", {"a": 2.0, "b": -1.0, "c": 0.5}, ()),
    ("identity", {}, ()),
    ("transpose", {}, ("right inverse", "projection")),
    ("cast", {"dtype": "float64"}, ()),
    ("detach", {}, ()),
    ("weight_dropout", {"p": 0.5}, ()),
    ("low_rank", {"rank": 2}, ()),
    ("fixed_rank", {"rank": 2}, ()),
    ("kronecker", {"factor_shape": [2, 3]}, ()),
    ("fake_quantize", {"bits": 4}, ROUNDING),
    ("fake_quantize", {"bits": 4, "symmetric": False, "scheme": "per_channel"}, ROUNDING),
    ("fake_quantize", {"bits": 4, "step": "learned"}, ROUNDING),
    ("binary", {}, ROUNDING),
    ("ternary", {}, ROUNDING),
    ("quantized_storage", {}, ("shape", "gradient")),
    ("lora", {"r": 2}, ()),
    ("dora", {"r": 2}, ROUNDING),
    ("adalora", {"r": 2}, ()),
    ("vera", {"r": 2}, ()),
    ("loha", {"r": 2}, ()),
    ("lokr", {"r": 1}, ()),
    ("ia3", {}, ()),
    ("hira", {"r": 2}, ()),
    ("delora", {"r": 2}, ()),
    ("oft", {"oft_block_size": 2}, ()),
    ("hra", {"r": 2}, ()),
    ("road", {"group_size": 2}, ()),
    ("shira", {"r": 1}, ()),
    ("fourierft", {"n_frequency": 5}, ()),
    ("c3a", {"block_size": 2}, ()),
    ("miss", {"r": 4}, ()),
    ("gralora", {"r": 4}, ()),
    ("trainable_tokens", {"token_indices": [1, 2]}, ()),
]
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]


@pytest.mark.parametrize(("name", "arguments", "skip"), CASES, ids=IDS)
def test_the_laws_hold(name: str, arguments: dict[str, Any], skip: tuple[str, ...]) -> None:
    check_parametrization(name, (4, 6), arguments=arguments, skip=skip)


@pytest.mark.parametrize(("name", "arguments", "skip"), CASES, ids=IDS)
def test_shapes_are_known_on_the_meta_device(name: str, arguments: dict[str, Any], skip: tuple[str, ...]) -> None:
    on_cpu, on_meta = torch.randn(4, 6), torch.empty(4, 6, device="meta")
    shapes = []
    for weight in (on_cpu, on_meta):
        step = construct(find(name), weight, arguments)
        assert repr(step)
        X: Any = step.right_inverse(weight)  # type: ignore[operator]
        value = step(*(X if isinstance(X, tuple) else (X,)))
        assert value.device == weight.device
        shapes.append((value.shape, value.dtype))
    assert shapes[0] == shapes[1]
