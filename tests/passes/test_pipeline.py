"""The passes, one after the other, on a graph small enough to read."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rewriter import load_spec, rewrite
from rewriter._rewrite import attach_sites, rewriting_of
from rewriter.passes import (
    Pass,
    PassError,
    cache_pass,
    insert_pass,
    open_pass,
    outline,
    print_graph,
    prune_pass,
    run_passes,
    unfolded,
    verify_against,
)
from rewriter.planning import prepare


class Net(nn.Module):
    """A layer called twice and a tensor read directly, tied to each other's side by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fc(x)) @ self.w)


def after(passes: Sequence[Pass], *, cache: str = "forward", model: nn.Module | None = None) -> str:
    """The graph of `Net` after some of the passes."""
    model = model or Net()
    rule = {"name": "r", "select": ["fc.weight", "w"], "chain": ["symmetric", "skew"], "cache": cache}
    prepared = prepare(model, load_spec({"reparam": 1, "rules": [{**rule, "init": "raw"}]}), "auto")
    rewriting = rewriting_of(model, prepared, attach_sites(prepared))
    run_passes(rewriting, passes)
    return print_graph(_with_modules(model, rewriting.graph))


def _with_modules(model: nn.Module, graph: fx.Graph) -> Any:
    model.__dict__["graph"] = graph
    return model


def text(lines: str) -> str:
    return dedent(lines).strip()


def test_open_makes_tensors_of_a_leaf_arguments() -> None:
    assert after([open_pass]) == text(
        """
        %1 = input
        %2 = fc.weight
        %3 = fc.bias
        %4 = linear(%1, %2, %3)
        %5 = relu(%4)
        %6 = w
        %7 = matmul(%5, %6)
        %8 = linear(%7, %2, %3)
        return %8
        """
    )


def test_insert_puts_one_evaluation_ahead_of_every_use() -> None:
    assert after([open_pass, insert_pass]) == text(
        """
        %1 = input
        %2 = fc.weight
        %3 = fc.bias
        %4 = evaluate fc.weight: original >> symmetric >> skew
        %5 = linear(%1, %4, %3)
        %6 = relu(%5)
        %7 = w
        %8 = evaluate w: original >> symmetric >> skew
        %9 = matmul(%6, %8)
        %10 = evaluate fc.weight: original >> symmetric >> skew
        %11 = linear(%9, %10, %3)
        return %11
        """
    )


def test_cache_merges_them_where_the_tensor_was_read_first() -> None:
    assert after([open_pass, insert_pass, cache_pass, prune_pass]) == text(
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


def test_never_leaves_one_evaluation_for_each_use() -> None:
    printed = after([open_pass, insert_pass, cache_pass, prune_pass], cache="never")
    assert printed.count("evaluate fc.weight [never]: ") == 2


def test_unfolding_shows_the_steps() -> None:
    rule = {"name": "r", "select": "fc.weight", "chain": ["symmetric", "skew"], "init": "raw"}
    new = rewrite(Net(), {"reparam": 1, "rules": [rule]})
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
    def lose(rewriting: Any) -> bool:
        node = next(node for node in rewriting.graph.nodes if node.target is torch.relu)
        node.replace_all_uses_with(node.args[0])
        rewriting.graph.erase_node(node)
        return True

    model = Net()
    before = outline(prepare(model, load_spec({"reparam": 1, "rules": [RULE]}), "auto").capture.graph)
    with pytest.raises(PassError, match=r"pass verify after open, lose: the graph lost .*relu.* and gained \[\]"):
        after([open_pass, Pass("lose", lose), verify_against(before)])


RULE = {"name": "r", "select": "fc.weight", "chain": ["symmetric"]}


def test_an_evaluation_too_many_is_found() -> None:
    skip = Pass("cache", lambda rewriting: False, ensures=cache_pass.ensures)
    with pytest.raises(PassError, match=r"pass cache after open, insert: fc\.weight is evaluated 2 times"):
        after([open_pass, insert_pass, skip])


def test_a_use_left_over_is_found() -> None:
    skip = Pass("insert", lambda rewriting: False, ensures=insert_pass.ensures)
    with pytest.raises(PassError, match=r"pass insert after open: fc\.weight is still read by fc"):
        after([open_pass, skip])
