"""Loads that fail leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import RewriterError
from tests.state.conftest import Net, assert_same, snapshot


class Exp(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.exp()


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no right inverse": (Exp(), {}, r"first\.weight: .*Exp has no right inverse"),
    "off the space": ("symmetric", {}, r"first\.weight: .*symmetric"),
    "of a dense weight": ({"l1_unstructured": {"amount": 5}}, {}, r"first\.weight: .*l1_unstructured"),
    "another shape": ("weight_norm", {"first.weight": torch.ones(2, 2)}, r"first\.weight: .*shape \[4, 4\].*\[2, 2\]"),
    "no tensor": ("weight_norm", {"first.weight": "text"}, r"first\.weight"),
    "not a number": ("weight_norm", {"first.weight": torch.full((4, 4), float("nan"))}, r"first\.weight"),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_bridged_is_an_error_and_changes_nothing(
    rewritten: Callable[..., nn.Module], case: str, strict: bool, nested: bool
) -> None:
    step, other, text = REFUSED[case]
    new = rewritten(step, **({"init": "raw"} if case == "no right inverse" else {}))
    before = snapshot(new)
    state: dict[str, Any] = {**Net().double().state_dict(), **other}
    target: nn.Module = nn.ModuleDict({"inner": new}) if nested else new
    if nested:
        state = {f"inner.{key}": value for key, value in state.items()}
    with pytest.raises(RuntimeError, match=text) as raised:
        target.load_state_dict(state, strict=strict)
    assert "before it is rewritten" in str(raised.value)
    if not nested:
        assert isinstance(raised.value, RewriterError)
        assert_same(new, before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("second.bias"),
        lambda state: state.update({"second.bias": torch.ones(2)}),
        lambda state: state.update({"other": torch.ones(2)}),
        lambda state: state.update({"scale": "text"}),
    ],
)
def test_a_wrong_load_changes_nothing(
    rewritten: Callable[..., nn.Module], change: Callable[[Any], Any], assign: bool
) -> None:
    new = rewritten("weight_norm")
    before, parameters = snapshot(new), list(new.parameters())
    for source in (Net().double(), rewritten("weight_norm")):
        state = dict(source.state_dict())
        change(state)
        with pytest.raises(RuntimeError):
            new.load_state_dict(state, assign=assign)
        assert_same(new, before)
        assert all(one is other for one, other in zip(new.parameters(), parameters, strict=True))


def test_an_interrupted_load_changes_nothing(
    rewritten: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    new = rewritten("weight_norm")
    before = snapshot(new)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(new.get_submodule("second"), "_load_from_state_dict", interrupted)
    for source in (Net().double(), rewritten("weight_norm")):
        with pytest.raises(KeyboardInterrupt):
            new.load_state_dict(source.state_dict())
        assert_same(new, before)
