"""Loading a state dict into a rewritten model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rewriter import rewrite


@pytest.mark.parametrize("chain", [["spectral_norm"], [{"scale": {"factor": 2.0}}, "spectral_norm"]])
def test_singular_vectors_are_fitted_to_a_weight_that_is_loaded_without_them(
    chain: list[Any], rule: Callable[..., dict[str, Any]]
) -> None:
    new = rewrite(nn.Sequential(nn.Linear(6, 6)).double(), rule("0.weight", *chain)).eval()
    other = torch.randn(6, 6, dtype=torch.float64)
    key = "0.parametrizations.weight.original"
    state = {name: value for name, value in new.state_dict().items() if not name.endswith(("._u", "._v"))}
    new.load_state_dict({**state, key: other}, strict=False)
    value = new.get_submodule("0").weight
    assert torch.linalg.matrix_norm(value, 2).item() == pytest.approx(1, abs=1e-5)


def test_singular_vectors_that_are_loaded_stay_as_they_are(rule: Callable[..., dict[str, Any]]) -> None:
    new = rewrite(nn.Sequential(nn.Linear(6, 6)), rule("0.weight", "spectral_norm"))
    state = {name: torch.randn_like(value) for name, value in new.state_dict().items()}
    new.load_state_dict(state)
    assert all(torch.equal(new.state_dict()[name], value) for name, value in state.items())


def test_a_plain_state_off_the_space_is_refused(rule: Callable[..., dict[str, Any]], capture: str) -> None:
    plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    new = rewrite(plain, rule("1.weight", "orthogonal"), capture=capture)
    before = {name: value.clone() for name, value in new.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"1\.weight.*orthogonal.*before it is rewritten.*set_value"):
            new.load_state_dict(plain.state_dict(), strict=strict)
    with pytest.raises(RuntimeError) as other:
        new.load_state_dict({**before, "0.weight": torch.ones(2)})
    assert "before it is rewritten" not in str(other.value)
    assert new.load_state_dict(before, assign=True).missing_keys == []
