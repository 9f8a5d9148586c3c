"""batch: equal chains over equal shapes are one call, and nothing but the speed changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import RewriterError, bake, evaluate_once, rewrite
from rewriter.passes import print_graph
from rewriter.sites._batch import BatchedEvaluation
from rewriter.state import freeze, unfreeze
from tests.rules import one_rule

HOUSEHOLDER = {"orthogonal": {"map": "householder"}}


def _layers(count: int = 5, size: int = 6) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Linear(size, size), nn.Tanh()]
    return nn.Sequential(*layers).double()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sites each batched run evaluated."""
    from rewriter.sites import _batch

    found: list[int] = []
    original = _batch._together

    def counted(sites: Any) -> Any:
        found.append(len(sites))
        return original(sites)

    monkeypatch.setattr(_batch, "_together", counted)
    return found


def test_the_graph_before_and_after() -> None:
    model = _layers(4)
    alone = print_graph(rewrite(model, one_rule(HOUSEHOLDER), without=["batch"]))
    assert alone.splitlines()[:4] == [
        "%1 = input",
        "%2 = evaluate 0.weight: original >> orthogonal(map=householder)",
        "%3 = 0.bias",
        "%4 = linear(%1, %2, %3)",
    ]
    together = print_graph(rewrite(model, one_rule(HOUSEHOLDER)))
    assert together.splitlines()[:5] == [
        "%1 = input",
        "%2 = evaluate together 0.weight, 2.weight, 4.weight, 6.weight",
        "%3 = evaluate 0.weight [from %2]: original >> orthogonal(map=householder)",
        "%4 = 0.bias",
        "%5 = linear(%1, %3, %4)",
    ]


@pytest.mark.parametrize(
    "chain",
    [
        (HOUSEHOLDER,),
        ({"orthogonal": {"map": "cayley"}},),
        ({"orthogonal": {"map": "matrix_exp", "trivialization": False}},),
        ("symmetric", {"scale": {"factor": 0.5}}),
        ("skew",),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [{}, {"per": {"dim": 0, "chunks": 2}}], ids=["whole", "chunks"])
def test_values_and_gradients_are_those_of_one_after_the_other(chain: Any, layout: Any, runs: list[int]) -> None:
    if layout and chain[0] in ("symmetric", "skew"):
        layout = {"reshape": ["out", -1]}
    model, x = _layers(), torch.randn(3, 6, dtype=torch.float64)
    init = "sample" if "orthogonal" in str(chain) else "raw"
    torch.manual_seed(1)
    new = rewrite(model, one_rule(*chain, init=init, batch="always", **layout))
    torch.manual_seed(1)
    alone = rewrite(model, one_rule(*chain, init=init, batch="never", **layout))
    assert list(new.state_dict()) == list(alone.state_dict())
    runs.clear()
    out = new(x)
    assert runs == [5]
    torch.testing.assert_close(out, alone(x))
    out.square().sum().backward()
    alone(x).square().sum().backward()
    for one, other in zip(new.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_auto_batches_what_the_cost_model_says(runs: list[int]) -> None:
    def batches(model: nn.Module, **options: Any) -> int:
        new = rewrite(model, one_rule(HOUSEHOLDER, **options))
        return sum(isinstance(module, BatchedEvaluation) for module in new.modules())

    assert batches(_layers(4, 16)) == 1
    assert batches(_layers(2, 16)) == 0
    assert batches(_layers(2, 16), batch="always") == 1
    assert batches(_layers(4, 128)) == 1
    assert batches(_layers(4, 257)) == 0
    assert batches(_layers(4, 16), batch="never") == 0
    assert batches(_layers(4, 16), cache="version") == 0
    assert batches(_layers(4, 16), memory="recompute") == 0


class _Batched(nn.Module):
    batched = True

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, X: Tensor) -> Tensor:
        return X * self.factor


class _OnlySaysSo(_Batched):
    def forward(self, X: Tensor) -> Tensor:
        return X / X.norm()


def test_a_step_that_does_not_broadcast_is_not_batched_and_refused_where_it_must_be() -> None:
    new = rewrite(_layers(), one_rule(_OnlySaysSo(), init="raw"))
    assert not any(isinstance(module, BatchedEvaluation) for module in new.modules())
    with pytest.raises(RewriterError, match="other values in a batch than alone"):
        rewrite(_layers(), one_rule(_OnlySaysSo(), init="raw", batch="always"))


def test_sites_that_differ_later_are_evaluated_by_themselves(runs: list[int]) -> None:
    new, x = rewrite(_layers(), one_rule(_Batched(2.0), init="raw")), torch.randn(3, 6, dtype=torch.float64)
    new(x)
    assert runs.pop() == 5
    new.get_submodule("2.parametrizations.weight.0").factor = 3.0
    runs.clear()
    value = new(x)
    assert not runs
    plain = bake(new)
    torch.testing.assert_close(value, plain(x))


def test_copies_pickles_and_conversions_batch_their_own_tensors(runs: list[int]) -> None:
    new, x = rewrite(_layers(), one_rule(HOUSEHOLDER)), torch.randn(3, 6, dtype=torch.float64)
    before = new(x)
    stream = io.BytesIO()
    torch.save(new, stream)
    stream.seek(0)
    for clone in (copy.deepcopy(new), torch.load(stream, weights_only=False)):
        torch.testing.assert_close(clone(x), before)
        with torch.no_grad():
            for parameter in clone.parameters():
                parameter.mul_(0.5)
        runs.clear()
        torch.testing.assert_close(clone(x), bake(clone)(x))
        assert runs
        torch.testing.assert_close(new(x), before)
    assert new.float()(x.float()).dtype == torch.float32
    assert runs[-1] == 5


def test_baking_takes_the_batch_out() -> None:
    model, x = _layers(), torch.randn(3, 6, dtype=torch.float64)
    new = rewrite(model, one_rule(HOUSEHOLDER))
    plain = bake(new)
    assert type(plain) is nn.Sequential
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in model.named_modules()]
    torch.testing.assert_close(plain(x), new(x))
    rest = bake(new, only=["0.weight"])
    assert "evaluate together 2.weight, 4.weight, 6.weight, 8.weight" in print_graph(rest)
    torch.testing.assert_close(rest(x), new(x))
    few = bake(new, only=["{0,2}.weight"])
    assert "together" not in print_graph(few)
    torch.testing.assert_close(few(x), new(x))


def test_rewriting_again_makes_new_groups() -> None:
    model, x = _layers(8), torch.randn(3, 6, dtype=torch.float64)
    four = ["0.weight", "2.weight", "4.weight", "6.weight"]
    first = rewrite(model, one_rule(HOUSEHOLDER, select=four))
    text = print_graph(first)
    both = one_rule(HOUSEHOLDER, select=four)
    both["rules"].append({"name": "rest", "select": "8.weight", "chain": ["symmetric"]})
    second = rewrite(first, both)
    assert text.splitlines()[1] in print_graph(second).splitlines()
    torch.testing.assert_close(second(x), bake(second)(x))


def test_scripting_sees_the_chains(recwarn: Any) -> None:
    new, x = rewrite(_layers(), one_rule(HOUSEHOLDER)), torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(new)(x), new(x))


def test_a_cached_value_is_not_evaluated_in_a_batch(runs: list[int]) -> None:
    new, x = rewrite(_layers(), one_rule(HOUSEHOLDER)), torch.randn(3, 6, dtype=torch.float64)
    expected = new(x)
    runs.clear()
    freeze(new, only=["0.weight"])
    torch.testing.assert_close(new(x), expected)
    unfreeze(new)
    with evaluate_once(new):
        torch.testing.assert_close(new(x), expected)
    assert not runs
    new(x)
    assert runs == [5]


@pytest.mark.slow
def test_functional_call_vmap_and_compile(runs: list[int]) -> None:
    new, x = rewrite(_layers(), one_rule(HOUSEHOLDER)), torch.randn(3, 6, dtype=torch.float64)
    other = {name: parameter * 0.9 for name, parameter in new.named_parameters()}
    reference = copy.deepcopy(new)
    reference.load_state_dict({**new.state_dict(), **other})
    torch.testing.assert_close(torch.func.functional_call(new, other, (x,)), bake(reference)(x))
    torch.testing.assert_close(torch.vmap(new)(x), new(x))
    compiled: Callable[..., Any] = torch.compile(new, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), new(x))
    assert torch.export.export(new, (x,)).module()(x).shape == (3, 6)


class _Leaks(_Batched):
    """Alone in a batch of few it is what it says; the fiftieth and later take from their neighbours."""

    def forward(self, X: Tensor) -> Tensor:
        return X if X.ndim == 2 or len(X) <= 64 else X + X[:50].mean(0) * (torch.arange(len(X)) % 14 > 0).view(-1, 1, 1)


class _Silent(_Batched):
    """Advances a state in train mode, shows it in no value of the first call, and does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        value = X + self.seen
        if self.training:
            self.seen += 1
        return value


@pytest.mark.parametrize(("step", "training"), [(_Leaks, True), (_Silent, True), (_Silent, False)])
def test_what_is_no_function_of_each_site_alone_is_not_batched(step: Any, training: bool) -> None:
    model, x = _layers(99, 2).train(training), torch.randn(3, 2, dtype=torch.float64)
    new = rewrite(model, one_rule(step(), init="raw"))
    assert not any(isinstance(module, BatchedEvaluation) for module in new.modules())
    new.train()
    alone = rewrite(model, one_rule(step(), init="raw"), without=["batch"]).train()
    for _ in range(2):
        torch.testing.assert_close(new(x), alone(x))
    torch.testing.assert_close(new.state_dict(), alone.state_dict())
    with pytest.raises(RewriterError, match="batch"):
        rewrite(model, one_rule(step(), init="raw", batch="always"))


def test_sites_with_unlike_settings_are_grouped_by_them(runs: list[int]) -> None:
    model, x = _layers(8), torch.randn(3, 6, dtype=torch.float64)
    for index, layer in enumerate(model[::2]):
        layer.train(index % 2 == 0)
    new = rewrite(model, one_rule(HOUSEHOLDER))
    runs.clear()
    torch.testing.assert_close(new(x), bake(new)(x))
    assert runs == [4, 4]
