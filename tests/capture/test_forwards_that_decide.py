"""Forwards that decide by their arguments, and what tracing them restores and says."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import plan, rewrite
from rewriter.errors import CaptureError

X = torch.linspace(-1, 1, 12).reshape(3, 4)
Y = torch.linspace(2, -1, 12).reshape(3, 4)


@dataclass
class Output:
    value: Tensor
    extra: Any = None


def test_dataclass_outputs_keep_their_class(model_of: Any, spec: Any) -> None:
    model = model_of(lambda self, x: Output(self.fc(x), [x]))
    new = rewrite(model, spec)
    assert isinstance(new(X), Output)
    torch.testing.assert_close(new(X).value, model(X).value)


def test_an_optional_argument_that_decides(assert_same: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor, mask: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        if mask is not None and scale is None:
            return self.fc(x) * mask
        return self.fc(x) + (1 if scale is None else 2)

    y = torch.tensor(2.0)
    calls = [lambda m: m(X), lambda m: m(X, y), lambda m: m(X, y, y), lambda m: m(X, scale=y)]
    assert_same(model_of(forward), calls, "module")


def test_an_argument_that_may_be_none_by_its_annotation(assert_same: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.fc(x) if mask is None else self.fc(x) * mask

    assert_same(model_of(forward), [lambda m: m(X, None), lambda m: m(X, Y)], "module")


def test_default_flags_that_decide(assert_same: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor, double: bool = False, mode: str = "a") -> Tensor:
        return self.fc(x) * (2 if double else 1) + (1 if mode == "a" else 0)

    assert_same(model_of(forward), [lambda m: m(X), lambda m: m(X, True), lambda m: m(X, mode="b")], "module")


def test_arguments_in_stars(assert_same: Any, model_of: Any) -> None:
    def keywords(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fc(x) if kwargs.get("y") is None else self.fc(x) + kwargs["y"]

    assert_same(model_of(keywords), [lambda m: m(X), lambda m: m(X, y=Y)], "module")

    def several(self: Any, *xs: Tensor, double: bool = False) -> Tensor:
        return self.fc(xs[0]) + xs[1] if not double else self.fc(xs[0])

    assert_same(model_of(several), [lambda m: m(X, Y), lambda m: m(X, Y, double=True)], "module")

    def ignored(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fc(x)

    assert_same(model_of(ignored), [lambda m: m(X), lambda m: m(X, y=Y)])


def test_a_class_with_its_own_call_is_called(once: Any, model_of: Any) -> None:
    class Doubling(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(2 * x)

    once(model_of(lambda self, x: self.other(self.fc(x)), other=Doubling(4, 4)))
    once(nn.Sequential(Doubling(4, 4), nn.Linear(4, 4)))
    once(Doubling(4, 4), "module")


def test_a_forward_replaced_on_the_object(model_of: Any, spec: Any) -> None:
    model = model_of(lambda self, x: self.fc(x))
    new = copy.deepcopy(model)
    object.__setattr__(new, "forward", functools.partial(type(new).forward, new))
    with torch.no_grad():
        assert plan(new, spec).root == "module"


def test_attention_without_weights_returns_none(once: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out, weights = self.attn(x, x, x, need_weights=False)
        return self.fc(out if weights is None else weights)

    once(model_of(forward, attn=nn.MultiheadAttention(4, 2)), "graph")


def test_what_a_module_returns_may_be_none(once: Any, model_of: Any) -> None:
    class Maybe(nn.Module):
        def __init__(self, gives: bool) -> None:
            super().__init__()
            self.gives = gives

        def forward(self, x: Tensor) -> Any:
            return x * 2, (x + 1 if self.gives else None)

    def forward(self: Any, x: Tensor) -> Tensor:
        out, cache = self.maybe(self.fc(x))
        if cache is not None:
            out = out + cache
        return out

    once(model_of(forward, maybe=Maybe(True)), "module")
    once(model_of(forward, maybe=Maybe(False)), "module")

    def whole(self: Any, x: Tensor) -> Tensor:
        y = self.maybe(self.fc(x))
        z = torch.relu(x)
        return y[0] if z is not None else y[1]

    once(model_of(whole, maybe=Maybe(False)), "graph")


def test_an_argument_compared_with_none(assert_same: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor, mask) -> Tensor:  # type: ignore[no-untyped-def]
        if mask is not None:
            x = x * mask
        return self.fc(x)

    assert_same(model_of(forward), [lambda m: m(X, None), lambda m: m(X, Y)], "module")


def test_gradients_that_a_forward_turns_on(model_of: Any, spec: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.fc(x)

    new = rewrite(model_of(forward), spec)
    with torch.no_grad():
        assert new(X).requires_grad


def test_an_untested_none_is_noticed_with_example_inputs(model_of: Any, spec: Any) -> None:
    space: dict[str, Any] = {}
    exec("def forward(self, x, m): return self.fc(x) if m is None else self.fc(x) * m", space)  # it has no source
    model = model_of(space["forward"])
    assert plan(model, spec).root == "graph"
    found = plan(model, spec, example_inputs=(X, None), capture="auto")
    assert found.root == "module"


def test_the_reason_of_a_decorated_forward(model_of: Any, spec: Any) -> None:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return function(self, *args, **kwargs)

    def function(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fc(x)

    model = model_of(functools.wraps(function)(wrapper))
    assert plan(model, spec).why.startswith("data-dependent forward: kept as it is (module capture)")
    with pytest.raises(CaptureError, match=r"Model.forward is wrapped by a decorator"):
        plan(model, spec, capture="graph")


def test_tracing_restores_flags_and_patches_nothing_else(model_of: Any, spec: Any) -> None:
    seen: list[Any] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        seen.append((torch.zeros, nn.Module.__setattr__, isinstance, globals().get("isinstance")))
        return self.fc(x) if self.training else x

    model = model_of(forward)
    model.fc.eval()
    expected = (torch.zeros, nn.Module.__setattr__, isinstance, None)
    plan(model, spec)
    assert seen and all(one == expected for one in seen)
    assert model.training is True and model.fc.training is False
