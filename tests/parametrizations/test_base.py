"""The base class of the catalog: fields become arguments, text and signature."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.language import load_spec
from rewriter.parametrizations import Orthogonal, Scale
from rewriter.parametrizations._base import Parametrization
from rewriter.parametrizations._registry import arguments_of, register


class Power(Parametrization):
    exponent: float
    times: int = 1

    def forward(self, X: Tensor) -> Tensor:
        return X**self.exponent * self.times


class Turned(Orthogonal):
    """A subclass in a module that does not import the names in the annotations of its base."""


class Own(Orthogonal):
    def __init__(self, size: int) -> None:
        super().__init__("cayley", weight=torch.eye(size))


def test_fields_are_arguments_by_position_and_by_name() -> None:
    for step in (Power(2, 3), Power(exponent=2.0, times=3), Power(2, times=3)):
        assert (step.exponent, step.times) == (2.0, 3)
        assert isinstance(step.exponent, float)
    assert list(inspect.signature(Power).parameters) == ["exponent", "times", "weight"]
    assert list(arguments_of(Power)) == ["exponent", "times"]


@pytest.mark.parametrize("arguments", [{}, {"exponent": 1, "exponnet": 2}], ids=["missing", "unknown"])
def test_wrong_arguments_are_a_type_error(arguments: dict[str, float]) -> None:
    with pytest.raises(TypeError, match="expon"):
        Power(**arguments)


def test_the_text_shows_arguments_that_are_not_the_default() -> None:
    assert repr(Power(2.0)) == "Power(exponent=2.0)"
    assert repr(Power(2.0, 5)) == "Power(exponent=2.0, times=5)"


def test_a_subclass_elsewhere_has_the_arguments_of_its_base() -> None:
    assert Turned("cayley", weight=torch.eye(2)).map == "cayley"
    with pytest.raises(RewriterError, match="map must be matrix_exp, cayley or householder"):
        Turned("exp", weight=torch.eye(2))
    register("turned_for_the_test")(Turned)
    rule = {"name": "r", "select": "x", "chain": [{"turned_for_the_test": {"map": "exp"}}]}
    with pytest.raises(RewriterError, match="`map` must be"):
        load_spec({"reparam": 1, "rules": [rule]})


def test_a_constructor_of_its_own_wins() -> None:
    assert list(inspect.signature(Own).parameters) == ["size"]
    assert Own(3).map == "cayley"


@pytest.mark.parametrize("step", [Scale(2.0), Power(2.0, 5), Own(3)], ids=repr)
def test_members_survive_copies(step: Parametrization) -> None:
    for again in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert repr(again) == repr(step)
        assert torch.equal(again(torch.ones(3, 3)), step(torch.ones(3, 3)))


@pytest.mark.slow
def test_the_registry_alone_imports_no_member() -> None:
    code = "import sys, rewriter.parametrizations._registry; print('rewriter.parametrizations._base' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
