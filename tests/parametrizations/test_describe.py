from __future__ import annotations

import pytest

from rewriter.parametrizations import describe
from rewriter.parametrizations._base import Parametrization
from rewriter.parametrizations._registry import find
from tests.members import members


@pytest.mark.parametrize("name", members())
def test_every_member_has_the_base_and_describes_itself(name: str) -> None:
    member, entry = find(name), describe(name)
    assert isinstance(member, type) and issubclass(member, Parametrization)
    assert member.name == name
    assert entry.summary.endswith(".") and entry.guarantee and entry.cost
    assert entry.example.startswith(">>> import torch")
    assert entry.right_inverse == hasattr(member, "right_inverse")


def test_a_description_shows_types_and_defaults() -> None:
    assert describe("interval").arguments == ("low: float | None = None", "high: float | None = None")
    assert describe("block_diagonal").arguments == ("blocks: int",)
    assert describe("torch.WeightNorm").arguments == ("dim: int | None = 0",)


def test_an_unknown_name_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(LookupError, match="did you mean 'orthogonal'"):
        describe("ortogonal")
