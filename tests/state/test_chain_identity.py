"""The chain that a state dict was saved from travels with it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import RewriterError, absorb, rewrite
from tests.state.conftest import Net, assert_same, snapshot

OTHER: dict[str, tuple[Any, Any]] = {
    "an argument": ({"lora": {"r": 2, "lora_alpha": 2}}, {"lora": {"r": 2, "lora_alpha": 64}}),
    "a map": ({"orthogonal": {"map": "cayley"}}, {"orthogonal": {"map": "matrix_exp"}}),
    "a step": ("symmetric", "skew"),
}


def through_a_file(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", OTHER)
def test_a_state_of_another_chain_is_refused_with_both(
    rewritten: Callable[..., nn.Module], case: str, strict: bool, nested: bool, prefix: str
) -> None:
    one, other = (rewritten(step) for step in OTHER[case])
    before = snapshot(one)
    target: nn.Module = nn.ModuleDict({"module": one}) if nested else one
    source: nn.Module = nn.ModuleDict({"module": other}) if nested or prefix else other
    chains = [site.spec.chain[0] for site in (_site(other), _site(one))]
    with pytest.raises(RuntimeError) as raised:
        target.load_state_dict(through_a_file(source.state_dict()), strict=strict)
    text = str(raised.value)
    assert text.index("first.weight") < text.index(chains[0]) < text.index(chains[1])
    changed = {} if nested else before  # the outer module loads its other tensors as torch does
    assert_same(one, {**snapshot(one), **changed, **{key: before[key] for key in before if "parametrizations" in key}})
    assert isinstance(raised.value, RewriterError) is not nested


@pytest.mark.parametrize("case", OTHER)
def test_a_state_without_the_entry_loads_as_torchs(rewritten: Callable[..., nn.Module], case: str) -> None:
    one, other = (rewritten(step) for step in OTHER[case])
    state = dict(other.state_dict())
    one.load_state_dict(state)
    assert_same(one, state)


@pytest.mark.parametrize("options", [{"cache": "version"}, {"cache": "never"}, {"memory": "recompute"}])
def test_options_that_change_speed_alone_are_no_other_chain(
    rewritten: Callable[..., nn.Module], options: dict[str, Any]
) -> None:
    one, other = rewritten("symmetric"), rewritten("symmetric", **options)
    one.load_state_dict(through_a_file(other.state_dict()))
    assert_same(one, dict(other.state_dict()))


def test_chunks_are_part_of_the_chain(capture: str, spec: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 6))
    one, other = (
        rewrite(model, spec("0.weight", "orthogonal", per={"dim": 0, "chunks": chunks}), capture=capture)
        for chunks in (2, 6)
    )
    with pytest.raises(RuntimeError, match=r"(?s)chunks=6.*chunks=2"):
        one.load_state_dict(other.state_dict())


def test_a_module_from_python_is_known_by_its_settings(rewritten: Callable[..., nn.Module]) -> None:
    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, X: Tensor) -> Tensor:
            return X * self.factor

        def right_inverse(self, value: Tensor) -> Tensor:
            return value / self.factor

    with pytest.raises(RuntimeError, match=r"(?s)factor=3.*factor=2"):
        rewritten(Times(2.0)).load_state_dict(rewritten(Times(3.0)).state_dict())


def test_the_entry_adds_no_key_and_torch_ignores_it(rewritten: Callable[..., nn.Module]) -> None:
    new, plain = rewritten("weight_norm"), Net().double()
    nn.utils.parametrizations.weight_norm(plain.first)
    state = through_a_file(new.state_dict())
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    x = torch.ones(1, 4).double()
    torch.testing.assert_close(plain(x), new(x))


def test_an_absorbed_tensor_takes_any_state_that_fits(capture: str) -> None:
    source = Net().double()
    nn.utils.parametrizations.weight_norm(source.first)
    new = absorb(source)
    state = rewrite(Net().double(), _weight_norm(), capture=capture).state_dict()
    new.load_state_dict(state)
    assert_same(new, dict(state))


@pytest.mark.parametrize("entry", ["text", 3, {"chain": 3}, {}, {"chain": ["weight_norm"]}, None])
def test_a_damaged_entry_does_not_fail_otherwise(rewritten: Callable[..., nn.Module], entry: Any) -> None:
    new = rewritten("weight_norm")
    state = new.state_dict()
    state._metadata["first.parametrizations.weight"]["reparam"] = entry
    if isinstance(entry, dict):
        with pytest.raises(RewriterError, match="weight_norm"):
            new.load_state_dict(state)
    else:
        new.load_state_dict(state)


def _site(model: nn.Module) -> Any:
    return model.get_submodule("first.parametrizations.weight")


def _weight_norm() -> dict[str, Any]:
    return {"reparam": 1, "rules": [{"name": "r", "select": "first.weight", "chain": ["weight_norm"]}]}
