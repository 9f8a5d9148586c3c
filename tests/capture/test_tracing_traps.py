"""Forwards that a symbolic trace could get wrong without a word: each is captured rightly, or not traced.

Every model here is rewritten with a chain that keeps its weights, so that the plain model is the reference.
"""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, rand, zeros
from torch.utils.checkpoint import checkpoint

from rewriter import bake, plan, rewrite

KEPT: list[Any] = []
Pair = namedtuple("Pair", ["first", "second"])


class Halved(nn.Module):
    """Exactly the weight again: halves and doubles lose nothing."""

    def forward(self, X: Tensor) -> Tensor:
        return X / 2

    def right_inverse(self, X: Tensor) -> Tensor:
        return X * 2


SPEC = {"reparam": 1, "rules": [{"name": "kept", "select": {"regex": "(.*[.])?weight"}, "chain": [Halved()]}]}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(4))


X = torch.linspace(-1, 1, 12).reshape(3, 4)
Y = torch.linspace(2, -1, 12).reshape(3, 4)


def model_of(forward: Callable[..., Any], **attributes: Any) -> nn.Module:
    """A model with one linear layer `fc`, a buffer `count`, and this forward."""
    model = type("Model", (Base,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def flat(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def assert_same(model: nn.Module, calls: list[Callable[[nn.Module], Any]], root: str | None = None) -> nn.Module:
    """The rewritten model does in each call what the plain one does, and leaves the same buffers; it bakes back."""
    before = copy.deepcopy(model)
    new = rewrite(model, SPEC)
    if root is not None:
        found = plan(model, SPEC)
        assert found.root == root, found.why
    for training in (True, False):
        before.train(training), new.train(training)
        for call in calls:
            torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
            expected = call(before)
            torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
            found = call(new)
            assert type(found) is type(expected)
            assert len(flat(found)) == len(flat(expected))
            for one, other in zip(flat(found), flat(expected), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
                if isinstance(one, Tensor):
                    assert one.requires_grad == other.requires_grad
    torch.testing.assert_close(dict(new.named_buffers()), dict(before.named_buffers()), rtol=0, atol=0)
    if not hasattr(new, "last") and not hasattr(getattr(new, "inner", None), "last"):  # else torch cannot copy it
        assert type(bake(new)) is type(model)
    return new


def once(model: nn.Module, root: str | None = None) -> nn.Module:
    return assert_same(model, [lambda m: m(X.clone()), lambda m: m(Y.clone())], root)


# What the graph shows: recorded as it is.


def test_dropout_follows_the_training_flag() -> None:
    once(model_of(lambda self, x: F.dropout(self.fc(x), 0.5, self.training)), "graph")


def test_the_flag_of_a_submodule_is_read_when_the_graph_runs() -> None:
    model = model_of(lambda self, x: F.dropout(self.fc(x), self.drop.p, self.drop.training), drop=nn.Dropout(0.5))
    new = once(model, "graph")
    new.drop.eval(), model.drop.eval()
    torch.testing.assert_close(new(X), model(X))


def test_random_factories_stay_random() -> None:
    once(model_of(lambda self, x: self.fc(x) + torch.rand(4) + torch.zeros(x.size(0), 1)), "graph")


def test_random_factories_imported_by_name_stay_random() -> None:
    once(model_of(lambda self, x: self.fc(x) + rand(4) + zeros(x.size(0), 1)), "graph")


def test_buffers_are_updated_in_place() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count.add_(x.detach().sum(0))
        return self.fc(x) + self.count

    once(model_of(forward), "graph")


def test_items_of_a_buffer_are_set() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count[1:3] = x.detach().sum(0)[:2]
        return self.fc(x) * self.count

    once(model_of(forward), "graph")


def test_augmented_assignment_is_in_place() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.fc(x)
        same = h
        h += 1
        h *= 2
        return same - h.detach() + same

    once(model_of(forward), "graph")


def test_augmented_assignment_of_a_size_makes_a_new_number() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        rows = x.shape[0]
        more = rows
        more += 2
        return self.fc(x) * rows + more

    once(model_of(forward), "graph")


def test_augmented_assignment_of_an_input_reaches_the_caller_s_tensor() -> None:
    def forward(self: Any, x: Any) -> Tensor:
        x += 1
        return self.fc(x)

    def call(model: nn.Module) -> Any:
        x = X.clone()
        return model(x), x

    assert_same(model_of(forward), [call])


def test_dtype_and_device_of_parameters_are_read_when_the_graph_runs() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc(x.to(next(self.parameters()).dtype))

    model = model_of(forward)
    new = once(model, "graph")
    torch.testing.assert_close(new.double()(X), model.double()(X), rtol=0, atol=0)


def test_an_optional_argument_that_is_only_passed_on() -> None:
    def forward(self: Any, q: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(self.fc(q), q, q, attn_mask=mask)

    calls = [
        lambda m: m(X[None]),
        lambda m: m(X[None], torch.eye(3, dtype=torch.bool)),
        lambda m: m(X[None], mask=None),
    ]
    assert_same(model_of(forward), calls, "graph")


def test_keyword_only_arguments_and_defaults() -> None:
    def forward(self: Any, x: Tensor, *, scale: float = 2.0) -> Tensor:
        return self.fc(x) * scale

    assert_same(model_of(forward), [lambda m: m(X), lambda m: m(X, scale=3.0)], "graph")


def test_super_forward() -> None:
    class Plain(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    class Derived(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(2 * x)

    once(Derived(), "graph")


def test_a_decorated_forward_keeps_its_decorator() -> None:
    def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            return 2 * function(*args, **kwargs)

        return wrapper

    @doubled
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc(x)

    once(model_of(forward), "graph")

    @doubled
    def keywords(self: Any, x: Tensor, *, shift: int = 1) -> Tensor:
        return self.fc(x) + shift

    assert_same(model_of(keywords), [lambda m: m(X), lambda m: m(X, shift=2)])


def test_hooks_of_the_root_fire() -> None:
    model = model_of(lambda self, x, y=1.0: self.fc(x) * y)
    model.register_forward_pre_hook(lambda m, args, kwargs: (args, {"y": 3.0}), with_kwargs=True)
    model.register_forward_hook(lambda m, args, out: out + 1)
    once(model, "graph")


@pytest.mark.parametrize("kind", [dict, tuple, list, Pair])
def test_structured_outputs(kind: Any) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        out = self.fc(x)
        return {"a": out, "b": [x, 1]} if kind is dict else Pair(out, x) if kind is Pair else kind([out, x])

    once(model_of(forward), "graph")


def test_sizes_are_those_of_the_input() -> None:
    model = model_of(lambda self, x: self.fc(x).reshape(x.shape[0] * 2, -1) / x.size(-1))
    assert_same(model, [lambda m: m(X), lambda m: m(torch.ones(5, 4))], "graph")


# What a graph would not show: the module is not traced.


@dataclass
class Output:
    value: Tensor
    extra: Any = None


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 5 * grad


class Cache:
    def __init__(self) -> None:
        self.seen: list[Any] = []


def _no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.fc(x)
    return y + x


@torch.no_grad()
def _no_grad_whole(self: Any, x: Tensor) -> Tensor:
    return self.fc(x)


def _grad_asked(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * (2 if torch.is_grad_enabled() else 3)


def _inference(self: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = self.fc(x)
    return y.clone()


def _autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.fc(x)


def _is_instance(self: Any, x: Any) -> Tensor:
    return self.fc(x) if isinstance(x, Tensor) else self.fc(x[0]) + 1


def _is_tensor(self: Any, x: Any) -> Tensor:
    return self.fc(x) if torch.is_tensor(x) else self.fc(x[0]) + 1


def _type_is(self: Any, x: Any) -> Tensor:
    return self.fc(x) if type(x) is Tensor else self.fc(x) + 1


def _has_attribute(self: Any, x: Any) -> Tensor:
    return self.fc(x) + 1 if hasattr(x, "mask") else self.fc(x)


def _get_attribute(self: Any, x: Any) -> Tensor:
    return self.fc(x) + getattr(x, "mask", 1)


def _python_random(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * random.random()


def _numpy_random(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * float(numpy.random.rand())


def _branch(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) if x.sum() > 0 else x


def _branch_on_training(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) if self.training else x


def _asserted(self: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == 4
    return self.fc(x)


def _length(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * len(x)


def _loop(self: Any, x: Tensor) -> Tensor:
    return torch.stack([self.fc(row) for row in x])


def _swallowed(self: Any, x: Tensor) -> Tensor:
    try:
        return self.fc(x) * len(x)
    except Exception:
        return self.fc(x)


def _sets_attribute(self: Any, x: Tensor) -> Tensor:
    self.last = self.fc(x)
    return self.last * 2


def _sets_past_setattr(self: Any, x: Tensor) -> Tensor:
    self.__dict__["last"] = self.fc(x)
    return self.last * 2


def _appends(self: Any, x: Tensor) -> Tensor:
    self.seen.append(1)
    return self.fc(x) * len(self.seen)


def _appends_deeper(self: Any, x: Tensor) -> Tensor:
    self.cache.seen.append(1)
    return self.fc(x) * len(self.cache.seen)


def _keeps(self: Any, x: Tensor) -> Tensor:
    KEPT.append(self.fc(x))
    return KEPT[-1]


def _checkpointed(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.fc, x, use_reentrant=False)


def _reentrant(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.fc, x.requires_grad_(), use_reentrant=True)


def _own_gradient(self: Any, x: Tensor) -> Tensor:
    return Straight.apply(self.fc(x))


def _functional_call(self: Any, x: Tensor) -> Tensor:
    return torch.func.functional_call(self.fc, {"bias": self.constant}, (x,))


def _vmapped(self: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(self.fc)(x)


def _seeded(self: Any, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return self.fc(x) + torch.rand(4)


def _dict_subclass(self: Any, x: Tensor) -> Any:
    return OrderedDict(a=self.fc(x))


def _looked_up(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * {torch.float32: 2}.get(x.dtype, 3)


def _plain_tensor(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * self.constant


def _own_module(self: Any, x: Tensor) -> Tensor:
    return nn.Softmax(-1)(self.fc(x))


def _sets_tensor_attribute(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y.data = y.data * 2
    return y


def _state_dict(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * len(self.state_dict())


def _device_context(self: Any, x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return self.fc(x) + torch.zeros(4)


REFUSED = {name[1:]: value for name, value in list(globals().items()) if name[0] == "_" and name[1] != "_"}


def refused(name: str) -> nn.Module:
    KEPT.clear()
    constant = {"constant": torch.arange(4.0)}
    attributes: dict[str, dict[str, Any]] = {
        "appends": {"seen": []},
        "appends_deeper": {"cache": Cache()},
        "plain_tensor": constant,
        "functional_call": constant,
    }
    return model_of(REFUSED[name], **attributes.get(name, {}))


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_does_not_show_is_not_traced(name: str) -> None:
    once(refused(name), "module")


@pytest.mark.parametrize("name", REFUSED)
def test_such_a_submodule_is_one_node_of_the_graph(name: str) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return self.inner(x), self.fc(x)

    once(model_of(forward, inner=refused(name)), None if name in ("keeps", "dict_subclass") else "graph")


def test_dataclass_outputs_keep_their_class() -> None:
    model = model_of(lambda self, x: Output(self.fc(x), [x]))
    new = rewrite(model, SPEC)
    assert isinstance(new(X), Output)
    torch.testing.assert_close(new(X).value, model(X).value)


def test_an_optional_argument_that_decides() -> None:
    def forward(self: Any, x: Tensor, mask: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        if mask is not None and scale is None:
            return self.fc(x) * mask
        return self.fc(x) + (1 if scale is None else 2)

    y = torch.tensor(2.0)
    calls = [lambda m: m(X), lambda m: m(X, y), lambda m: m(X, y, y), lambda m: m(X, scale=y)]
    assert_same(model_of(forward), calls, "module")


def test_an_argument_that_may_be_none_by_its_annotation() -> None:
    def forward(self: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.fc(x) if mask is None else self.fc(x) * mask

    assert_same(model_of(forward), [lambda m: m(X, None), lambda m: m(X, Y)], "module")


def test_default_flags_that_decide() -> None:
    def forward(self: Any, x: Tensor, double: bool = False, mode: str = "a") -> Tensor:
        return self.fc(x) * (2 if double else 1) + (1 if mode == "a" else 0)

    assert_same(model_of(forward), [lambda m: m(X), lambda m: m(X, True), lambda m: m(X, mode="b")], "module")


def test_arguments_in_stars() -> None:
    def keywords(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fc(x) if kwargs.get("y") is None else self.fc(x) + kwargs["y"]

    assert_same(model_of(keywords), [lambda m: m(X), lambda m: m(X, y=Y)], "module")

    def several(self: Any, *xs: Tensor, double: bool = False) -> Tensor:
        return self.fc(xs[0]) + xs[1] if not double else self.fc(xs[0])

    assert_same(model_of(several), [lambda m: m(X, Y), lambda m: m(X, Y, double=True)], "module")

    def ignored(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fc(x)

    assert_same(model_of(ignored), [lambda m: m(X), lambda m: m(X, y=Y)])


def test_a_call_of_one_s_own() -> None:
    class Doubling(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(2 * x)

    once(model_of(lambda self, x: self.other(self.fc(x)), other=Doubling(4, 4)))
    once(nn.Sequential(Doubling(4, 4), nn.Linear(4, 4)))
    once(Doubling(4, 4), "module")


def test_a_forward_replaced_on_the_object() -> None:
    model = model_of(lambda self, x: self.fc(x))
    new = copy.deepcopy(model)
    object.__setattr__(new, "forward", functools.partial(type(new).forward, new))
    with torch.no_grad():
        assert plan(new, SPEC).root == "module"


def test_attention_without_weights_returns_none() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out, weights = self.attn(x, x, x, need_weights=False)
        return self.fc(out if weights is None else weights)

    once(model_of(forward, attn=nn.MultiheadAttention(4, 2)), "graph")


def test_what_a_module_returns_may_be_none() -> None:
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


def test_an_argument_compared_with_none() -> None:
    def forward(self: Any, x: Tensor, mask) -> Tensor:  # type: ignore[no-untyped-def]
        if mask is not None:
            x = x * mask
        return self.fc(x)

    assert_same(model_of(forward), [lambda m: m(X, None), lambda m: m(X, Y)], "module")


def test_tracing_draws_no_random_numbers_and_leaves_the_model_alone() -> None:
    model = model_of(_python_random, seen=[1])
    state, python, attributes = torch.get_rng_state(), random.getstate(), dict(vars(model))
    plan(model, SPEC)
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert vars(model) == attributes and torch.rand is rand and "isinstance" not in globals()


def test_a_refusal_names_the_module_the_line_and_the_reason() -> None:
    inner = model_of(_branch)
    found = plan(model_of(lambda self, x: self.inner(self.fc(x)), inner=inner), SPEC)
    why = found.by_name["inner.fc.weight"].why
    assert "inner stays one node" in why and "test_tracing_traps.py" in why and "if x.sum() > 0" in why
