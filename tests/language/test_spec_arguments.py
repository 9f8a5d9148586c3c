"""What annotations of constructors admit, and how they are called in messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from annotated_types import Ge
from torch import nn
from typing_extensions import TypedDict

from rewriter.errors import SpecError
from rewriter.language import Step, load_spec
from rewriter.parametrizations._registry import register


class Side(Enum):
    LEFT = "left"


class Tree(TypedDict, total=False):
    left: Tree


@register("test_annotations")
class Annotations(nn.Module):
    def __init__(
        self,
        weight: torch.Tensor,
        any_value: Any = None,
        sizes: Sequence[int] = (),
        pair: tuple[int, float] = (1, 1.0),
        table: Mapping[str, float] | None = None,
        side: Side = Side.LEFT,
        mode: Literal["a", "b"] | bool = False,
        rank: Annotated[int, Ge(1)] = 1,
        file: Path | None = None,
        mask: torch.Tensor | None = None,
        hook: Callable[..., Any] | None = None,
        tree: Tree | None = None,
        branch: Tree = {},  # noqa: B006
        strange: lambda x: x = None,  # type: ignore[no-untyped-def, valid-type]
        later: NowhereDefined = None,  # type: ignore[name-defined]  # noqa: F821
        plain=None,  # type: ignore[no-untyped-def]
    ) -> None:
        super().__init__()


def step(**arguments: Any) -> Step:
    chain = [{"test_annotations": arguments}]
    return load_spec({"reparam": 1, "rules": [{"name": "a", "select": "x", "chain": chain}]}).rules[0].chain[0]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("any_value", {"a": [1, None]}, {"a": [1, None]}),
        ("sizes", [1, 2], [1, 2]),
        ("pair", [1, 2], (1, 2.0)),
        ("table", {"a": 1}, {"a": 1.0}),
        ("table", None, None),
        ("side", "left", Side.LEFT),
        ("mode", "a", "a"),
        ("mode", True, True),
        ("rank", 3, 3),
        ("file", "a/b", Path("a/b")),
        ("later", [1], [1]),
        ("plain", "x", "x"),
    ],
)
def test_an_argument_arrives_as_its_annotation_wants_it(name: str, value: Any, expected: Any) -> None:
    assert step(**{name: value}).arguments == {name: expected}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sizes", [1, "2"], "`sizes` must be a list of whole numbers, found '2' in it"),
        ("pair", [1], "`pair` must be a list of 2 values, found a list"),
        ("table", {"a": "1"}, "`table` must be a mapping of numbers or null, found '1' in it"),
        ("side", "right", "`side` must be 'left', found 'right'"),
        ("mode", 1, "`mode` must be 'a', 'b' or true or false, found 1"),
        ("rank", 0, "`rank` must be greater than or equal to 1, found 0"),
        ("mask", [1], "`mask` must be a Tensor or null, found a list"),
        ("hook", 1, "`hook` must be a callable or null, found 1"),
        ("tree", 1, "`tree` must be a mapping or null, found 1"),
        ("rank", torch.ones(2), "`rank` must be a whole number, found an object of class Tensor"),
        ("branch", {"left": 1}, "`branch` must be a mapping, found 1 in it"),
        ("weight", 1, "'test_annotations' has no argument 'weight'"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        step(**{name: value})
    assert message in str(caught.value)
    assert caught.value.diagnostics[0].path.startswith(f"rules[0].chain[0].test_annotations.{name}")


def test_a_float_may_be_infinite() -> None:
    text = "reparam: 1\nrules: [{name: a, select: x, chain: [ln_structured: {amount: 0.5, n: .inf}]}]\n"
    spec = load_spec(text)
    assert spec.rules[0].chain[0].arguments == {"amount": 0.5, "n": float("inf")}
    assert load_spec(spec.to_dict()) == spec


def test_a_tensor_can_be_given_from_python() -> None:
    mask = torch.ones(2, 2)
    assert step(mask=mask).arguments["mask"] is mask
