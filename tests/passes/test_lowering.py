"""Lowering: from a captured graph to one with sites, on graphs small enough to read."""

from __future__ import annotations

import copy
import pickle
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from rewriter import PlanError, RewriterError, bake, rewrite
from rewriter.bindings import RewrittenModule, _graph_module
from rewriter.passes import Lowering, Pass, PassError, print_graph, run_passes, unfolded


class Net(nn.Module):
    """A layer called twice and a tensor read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fc(x)) @ self.w)


def rewritten(*names: str, model: nn.Module | None = None, **options: Any) -> Any:
    rule = {"name": "r", "select": list(names), "chain": ["symmetric", "skew"], "init": "raw", **options}
    return rewrite(model or Net(), {"reparam": 1, "rules": [rule]}, capture="graph", without=["cast"])


def text(expected: str) -> str:
    return dedent(expected).strip()


def test_a_leaf_becomes_a_function_and_is_evaluated_once() -> None:
    assert print_graph(rewritten("fc.weight", "w")) == text(
        """
        %1 = input
        %2 = evaluate fc.weight: original >> symmetric >> skew
        %3 = fc.bias
        %4 = linear(%1, %2, %3)
        %5 = relu(%4)
        %6 = evaluate w: original >> symmetric >> skew
        %7 = matmul(%5, %6)
        %8 = linear(%7, %2, %3)
        return %8
        """
    )


def test_cache_never_gives_each_use_an_evaluation() -> None:
    printed = print_graph(rewritten("fc.weight", cache="never"))
    assert printed.count("evaluate fc.weight [never]: ") == 2


def test_the_captured_graph_stays_as_it_was() -> None:
    new = rewritten("fc.weight", "w")
    captured = text(
        """
        %1 = input
        %2 = fc(%1)
        %3 = relu(%2)
        %4 = w
        %5 = matmul(%3, %4)
        %6 = fc(%5)
        return %6
        """
    )
    assert print_graph(new, graph=new.captured) == captured
    part = bake(new, only=["w"])
    assert isinstance(part, RewrittenModule)
    assert print_graph(part) == print_graph(rewritten("fc.weight"))
    assert print_graph(part, graph=part.captured) == captured


def test_further_rules_lower_the_captured_graph_again() -> None:
    model = Net()
    both = rewritten("fc.weight", "w", model=model)
    rules = [
        {"name": name, "select": name, "chain": ["symmetric", "skew"], "init": "raw"} for name in ("fc.weight", "w")
    ]
    first = rewrite(model, {"reparam": 1, "rules": rules[:1]}, capture="graph", without=["cast"])
    then = rewrite(first, {"reparam": 1, "rules": rules}, without=["cast"])
    assert print_graph(then) == print_graph(both)


def test_unfolding_shows_the_steps() -> None:
    new = rewritten("fc.weight")
    assert print_graph(unfolded(new)) == text(
        """
        %1 = input
        %2 = fc.parametrizations.weight.original
        %3 = fc.parametrizations.weight.0(%2)
        %4 = fc.parametrizations.weight.1(%3)
        %5 = fc.bias
        %6 = linear(%1, %4, %5)
        %7 = relu(%6)
        %8 = w
        %9 = matmul(%7, %8)
        %10 = linear(%9, %4, %5)
        return %10
        """
    )
    x = torch.randn(2, 3)
    torch.testing.assert_close(unfolded(new)(x), new(x))


def test_a_failing_condition_names_the_pass_and_those_before_it() -> None:
    new = rewritten("fc.weight")

    def lose(lowering: Lowering) -> bool:
        raise PassError("relu is lost")

    lowering = Lowering(new, copy.deepcopy(new.graph), new.sites)
    with pytest.raises(PassError, match="pass lose after first: relu is lost"):
        run_passes(lowering, [Pass("first", lambda _: True), Pass("lose", lose)])


def _add_node(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        added = node.graph.call_function(torch.tanh, (node,))
    node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


@pytest.mark.parametrize(
    "edit",
    [
        lambda node: setattr(node, "target", torch.sigmoid),
        lambda node: setattr(node, "args", (node.args[0].args[0],)),
        _add_node,
    ],
    ids=["target", "argument", "node"],
)
@pytest.mark.parametrize("carry", [lambda new: new, copy.deepcopy, lambda new: pickle.loads(pickle.dumps(new))])
def test_an_edited_graph_is_not_lowered_again(edit: Any, carry: Any) -> None:
    new = rewritten("fc.weight", "w")
    edit(next(node for node in new.graph.nodes if node.target is torch.relu))
    new.recompile()
    new = carry(new)
    for lose in (bake, lambda new: bake(new, inplace=True), lambda new: bake(new, only=["w"])):
        with pytest.raises(PlanError, match="graph of the rewritten model was edited"):
            lose(new)


def test_a_partitioned_graph_is_not_lowered_again() -> None:
    """A partitioner moves nodes into a module of its own; baking would lose what a backend makes of that."""

    class Everything(OperatorSupportBase):
        def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
            return node.op == "call_function"

    new = rewritten("fc.weight", "w")
    x = torch.randn(2, 3)
    expected = new(x)
    fused = CapabilityBasedPartitioner(new, Everything()).partition_and_fuse(prefix="part")
    torch.testing.assert_close(fused(x), expected)
    with pytest.raises(PlanError, match="graph of the rewritten model was edited"):
        bake(fused)


def test_exports_and_copies_are_no_edits() -> None:
    new = rewritten("fc.weight")
    x = torch.randn(2, 3)
    torch.export.export(new, (x,))
    torch.jit.script(new)
    torch.compile(new, backend="eager")(x)
    for model in (new, copy.deepcopy(new), copy.copy(new), pickle.loads(pickle.dumps(new))):
        torch.testing.assert_close(bake(model)(x), new(x))


def test_a_forward_set_on_one_model_stays_there() -> None:
    one, other = rewritten("fc.weight"), rewritten("fc.weight")
    x = torch.randn(2, 3)
    expected = other(x)
    with pytest.raises(RewriterError, match="set forward on the model itself"):
        type(one).forward = lambda self, x: x
    one.forward = lambda x: -x
    torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(one(x), -x)
    assert "forward" not in vars(bake(one))


ASKS: dict[str, Any] = {
    "call": lambda new, x: new(x),
    "forward": lambda new, x: new.forward(x),
    "copy": lambda new, x: copy.deepcopy(new)(x),
    "pickle": lambda new, x: pickle.loads(pickle.dumps(new))(x),
    "trace": lambda new, x: fx.symbolic_trace(new)(x),
    "compile": lambda new, x: torch.compile(new, backend="eager")(x),
    "export": lambda new, x: torch.export.export(new, (x,)).module()(x),
    "bake": lambda new, x: bake(new)(x),
}


@pytest.mark.parametrize(
    "ask", [pytest.param(ask, marks=pytest.mark.slow if ask in ("compile", "export") else ()) for ask in ASKS]
)
def test_the_code_of_a_large_graph_is_written_when_it_is_asked_for(ask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_graph_module, "WRITTEN_AT_ONCE", 20)
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(10)])
    new = rewritten("*.weight", model=model)
    assert isinstance(vars(type(new))["forward"], property)
    called: list[int] = []
    if ask == "call":
        new.register_forward_hook(lambda *_: called.append(1))
    x = torch.randn(1, 2)
    value = ASKS[ask](new, x)
    torch.testing.assert_close(value, new(x))
    assert len(called) == (2 if ask == "call" else 0)
    assert new.code.count("parametrizations") >= len(model)
