"""cast: a value that only casting functions use is cast once under autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, rewrite
from rewriter.passes import print_graph

SPEC = {"reparam": 1, "rules": [{"name": "r", "select": "weight", "chain": ["symmetric"]}]}


class _Steps(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(x @ self.weight.T)
        return torch.nn.functional.linear(x, self.weight)


class _AlsoAdded(_Steps):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T @ self.weight + self.weight.sum()


class _Once(_Steps):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _casts(model: nn.Module, x: Tensor) -> int:
    """How often a 4×4 tensor becomes bfloat16 in a forward under autocast."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        casts = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            is_cast = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16
            self.casts += is_cast and args[0].shape == (4, 4)
            return func(*args, **kwargs)

    with torch.autocast("cpu", torch.bfloat16), Count() as count:
        model(x)
    return count.casts


def test_the_graph_says_where() -> None:
    new = rewrite(_Steps(), SPEC)
    assert "%2 = evaluate weight [cast once]: original >> symmetric" in print_graph(new).splitlines()
    assert "cast once" not in print_graph(rewrite(_Steps(), SPEC, without=["cast"]))


@pytest.mark.parametrize("kind", [_AlsoAdded, _Once])
def test_a_value_with_another_use_or_with_one_alone_is_left_to_autocast(kind: Any) -> None:
    assert "cast once" not in print_graph(rewrite(kind(), SPEC))


def test_a_value_is_cast_once_and_not_at_each_use() -> None:
    model, x = _Steps(), torch.randn(3, 4)
    assert _casts(rewrite(model, SPEC, without=["cast"]), x) == 4
    assert _casts(rewrite(model, SPEC), x) == 1


def test_outputs_are_equal_and_gradients_as_near_as_a_plain_weights() -> None:
    model, x = _Steps(), torch.randn(3, 4)
    once, each = rewrite(model, SPEC), rewrite(model, SPEC, without=["cast"])
    for new in (once, each):
        torch.testing.assert_close(new(x), bake(new)(x))
        with torch.autocast("cpu", torch.bfloat16):
            out = new(x)
            assert torch.equal(out, each(x))
        out.float().sum().backward()
    gradients = [new.parametrizations.weight.original.grad for new in (once, each)]
    assert gradients[0].dtype == torch.float32
    torch.testing.assert_close(*gradients, rtol=5e-2, atol=5e-2)


def test_only_float32_under_autocast_of_its_device_is_cast() -> None:
    new, x = rewrite(_Steps().double(), SPEC), torch.randn(3, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert new.parametrizations.weight(cast=True).dtype == torch.float64
    assert rewrite(_Steps(), SPEC)(x.float()).dtype == torch.float32


def test_copies_and_bakes_keep_and_lose_it() -> None:
    model, x = _Steps(), torch.randn(3, 4)
    clone = copy.deepcopy(rewrite(model, SPEC))
    assert _casts(clone, x) == 1
    assert "cast" not in print_graph(torch.fx.symbolic_trace(bake(clone)))
