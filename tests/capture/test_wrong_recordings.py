"""What torch.fx would record wrongly: each row of the table in docs/capture.md.

Each model is rewritten with a chain that does not change its weights, so that the plain model is the reference.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn, rand
from torch.utils.checkpoint import checkpoint

from rewriter import plan


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

AS_SUBMODULES = (
    "no_grad",
    "branch",
    "python_random",
    "appends_deeper",
    "own_gradient",
    "dict_subclass",
    "changes_flag",
)


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


def test_a_forward_that_a_graph_cannot_repeat_keeps_its_class(refused: nn.Module, once: Any) -> None:
    once(refused, "module")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in AS_SUBMODULES else pytest.mark.slow) for name in REFUSED]
)
def test_such_a_submodule_is_one_node(name: str, refused: nn.Module, once: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return self.inner(x), self.fc(x)

    once(model_of(forward, inner=refused), None if name in ("dict_subclass", "changes_flag") else "graph")


def test_a_custom_gradient_is_noticed_without_gradients_too(model_of: Any, spec: Any) -> None:
    with torch.no_grad():
        assert plan(model_of(_own_gradient), spec).root == "module"


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
