"""What torch.fx would record wrongly: each row of the table in docs/capture.md.

Each model is rewritten with a chain that does not change its weights, so that the plain model is the reference.
"""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn, rand
from torch.utils.checkpoint import checkpoint

from rewriter import plan, rewrite
from rewriter.errors import CaptureError

X = torch.linspace(-1, 1, 12).reshape(3, 4)
Y = torch.linspace(2, -1, 12).reshape(3, 4)


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


class GradAsked:
    def factor(self: Any) -> int:
        return 2 if torch.is_grad_enabled() else 3


def without_gradients(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


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


def _training_is_true(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) if self.training is True else x


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


def _changes_flag(self: Any, x: Tensor) -> Tensor:
    self.fc.eval()
    return self.fc(x)


def _set_grad_in_helper(self: Any, x: Tensor) -> Tensor:
    return without_gradients(self.fc, x)


def _grad_asked_in_helper(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) * GradAsked.factor(self)


def _default_dtype(self: Any, x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    try:
        return self.fc(x) * torch.ones(4).to(x.dtype)
    finally:
        torch.set_default_dtype(torch.float32)


def _saved_tensor_hooks(self: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return self.fc(x)


def _matched(self: Any, x: Any) -> Tensor:
    match x:
        case Tensor():
            return self.fc(x)
    return self.fc(x[0]) + 1


def _first_size_of_a_factory(self: Any, x: Tensor) -> Tensor:
    return self.fc(x) + torch.zeros(x.size(0), 4)


def _tested_deep_copy(self: Any, x: Tensor) -> Tensor:
    return self.fc(copy.deepcopy(x))


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


@pytest.fixture(params=REFUSED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def refused(name: str, model_of: Any) -> nn.Module:
    """A model whose forward does what a graph does not show."""
    constant = {"constant": torch.arange(4.0)}
    attributes: dict[str, dict[str, Any]] = {
        "appends": {"seen": []},
        "appends_deeper": {"cache": Cache()},
        "plain_tensor": constant,
        "functional_call": constant,
    }
    return model_of(REFUSED[name], **attributes.get(name, {}))


def test_a_forward_that_a_graph_cannot_repeat_is_kept(refused: nn.Module, once: Any) -> None:
    once(refused, "module")


def test_such_a_submodule_is_one_node(name: str, refused: nn.Module, once: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return self.inner(x), self.fc(x)

    once(model_of(forward, inner=refused), None if name in ("dict_subclass", "changes_flag") else "graph")


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


def test_a_custom_gradient_is_noticed_without_gradients_too(model_of: Any, spec: Any) -> None:
    with torch.no_grad():
        assert plan(model_of(_own_gradient), spec).root == "module"


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


def test_tracing_draws_no_random_numbers_and_leaves_the_model_alone(model_of: Any, spec: Any) -> None:
    model = model_of(_python_random, seen=[1])
    state, python, attributes = torch.get_rng_state(), random.getstate(), dict(vars(model))
    plan(model, spec)
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert vars(model) == attributes and torch.rand is rand and "isinstance" not in globals()


def test_a_refusal_names_the_module_the_line_and_the_reason(model_of: Any, spec: Any) -> None:
    inner = model_of(_branch)
    found = plan(model_of(lambda self, x: self.inner(self.fc(x)), inner=inner), spec)
    why = found.by_name["inner.fc.weight"].why
    assert "inner stays one node" in why and "test_wrong_recordings.py" in why and "if x.sum() > 0" in why
