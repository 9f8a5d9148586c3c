"""What a graph can show is recorded as the forward does it.

Every model here is rewritten with a chain that keeps its weights, so that the plain model is the reference.
"""

from __future__ import annotations

import functools
import threading
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, rand, zeros

from rewriter import rewrite

X = torch.linspace(-1, 1, 12).reshape(3, 4)
Pair = namedtuple("Pair", ["first", "second"])


def test_dropout_follows_the_training_flag(once: Any, model_of: Any) -> None:
    once(model_of(lambda self, x: F.dropout(self.fc(x), 0.5, self.training)), "graph")


def test_the_flag_of_a_submodule_is_read_when_the_graph_runs(once: Any, model_of: Any) -> None:
    model = model_of(lambda self, x: F.dropout(self.fc(x), self.drop.p, self.drop.training), drop=nn.Dropout(0.5))
    new = once(model, "graph")
    new.drop.eval(), model.drop.eval()
    torch.testing.assert_close(new(X), model(X))


def test_random_factories_stay_random_also_imported_by_name(once: Any, model_of: Any) -> None:
    once(model_of(lambda self, x: self.fc(x) + torch.rand(4) + torch.zeros((x.size(0), 1))), "graph")
    once(model_of(lambda self, x: self.fc(x) + rand(4) + zeros((x.size(0), 1))), "graph")


def test_buffers_are_updated_in_place(once: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count.add_(x.detach().sum(0))
        return self.fc(x) + self.count

    once(model_of(forward), "graph")


def test_items_of_a_buffer_are_set(once: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count[1:3] = x.detach().sum(0)[:2]
        return self.fc(x) * self.count

    once(model_of(forward), "graph")


def test_augmented_assignment_is_in_place(once: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.fc(x)
        same = h
        h += 1
        h *= 2
        return same - h.detach() + same

    once(model_of(forward), "graph")


def test_augmented_assignment_of_a_size_makes_a_new_number(once: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        rows = x.shape[0]
        more = rows
        more += 2
        return self.fc(x) * rows + more

    once(model_of(forward), "graph")


def test_augmented_assignment_of_an_input_reaches_the_caller_s_tensor(assert_same: Any, model_of: Any) -> None:
    def forward(self: Any, x: Any) -> Tensor:
        x += 1
        return self.fc(x)

    def call(model: nn.Module) -> Any:
        x = X.clone()
        return model(x), x

    assert_same(model_of(forward), [call])


def test_dtype_and_device_of_parameters_are_read_when_the_graph_runs(once: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc(x.to(next(self.parameters()).dtype))

    model = model_of(forward)
    new = once(model, "graph")
    torch.testing.assert_close(new.double()(X), model.double()(X), rtol=0, atol=0)


def test_an_optional_argument_that_is_only_passed_on(assert_same: Any, model_of: Any) -> None:
    def forward(self: Any, q: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(self.fc(q), q, q, attn_mask=mask)

    calls = [
        lambda m: m(X[None]),
        lambda m: m(X[None], torch.eye(3, dtype=torch.bool)),
        lambda m: m(X[None], mask=None),
    ]
    assert_same(model_of(forward), calls, "graph")


def test_keyword_only_arguments_and_defaults(assert_same: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor, *, scale: float = 2.0) -> Tensor:
        return self.fc(x) * scale

    assert_same(model_of(forward), [lambda m: m(X), lambda m: m(X, scale=3.0)], "graph")


def test_super_forward(once: Any, model_of: Any) -> None:
    class Plain(type(model_of(None))):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    class Derived(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(2 * x)

    once(Derived(), "graph")


def test_a_decorated_forward_keeps_its_decorator(assert_same: Any, once: Any, model_of: Any) -> None:
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


def test_hooks_of_the_root_fire(once: Any, model_of: Any) -> None:
    model = model_of(lambda self, x, y=1.0: self.fc(x) * y)
    model.register_forward_pre_hook(lambda m, args, kwargs: (args, {"y": 3.0}), with_kwargs=True)
    model.register_forward_hook(lambda m, args, out: out + 1)
    once(model, "graph")


@pytest.mark.parametrize("kind", [dict, tuple, list, Pair])
def test_structured_outputs(kind: Any, once: Any, model_of: Any) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        out = self.fc(x)
        return {"a": out, "b": [x, 1]} if kind is dict else Pair(out, x) if kind is Pair else kind([out, x])

    once(model_of(forward), "graph")


def test_sizes_are_those_of_the_input(assert_same: Any, model_of: Any) -> None:
    model = model_of(lambda self, x: self.fc(x).reshape(x.shape[0] * 2, -1) / x.size(-1))
    assert_same(model, [lambda m: m(X), lambda m: m(torch.ones(5, 4))], "graph")


def test_other_threads_run_their_models_while_one_is_traced(spec: Any) -> None:
    other = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))
    failed: list[Exception] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    assert isinstance(other(torch.rand(3, 4)), Tensor)
                assert all(isinstance(parameter, nn.Parameter) for parameter in other.parameters())
            except Exception as problem:
                failed.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(3):
            rewrite(nn.Sequential(*[nn.Linear(4, 4) for _ in range(100)]), spec)
    finally:
        stop.set()
        thread.join()
    assert not failed, failed[0]
