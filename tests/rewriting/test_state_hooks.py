"""What a model's class does to its state dict is done by the rewritten model, too."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, rewrite
from rewriter.bindings._graph_module import WRITTEN_AT_ONCE

SPEC = {"reparam": 1, "rules": [{"name": "w", "select": "fc.weight", "chain": ["weight_norm"]}]}


class Net(nn.Module):
    """Has extra state, and a hook that renames keys of old checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("epochs", torch.tensor(3))
        self.version = 1
        self.seen: list[str] = []
        self.register_load_state_dict_pre_hook(Net.rename)

    def rename(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}old" in state:
            state[f"{prefix}epochs"] = state.pop(f"{prefix}old")

    def get_extra_state(self) -> dict[str, int]:
        return {"version": self.version}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.__dict__["version"] = state["version"]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("carry", [lambda new: new, copy.deepcopy, lambda new: pickle.loads(pickle.dumps(new))])
def test_extra_state_and_load_hooks_survive(capture: str, carry: Any) -> None:
    new: Any = carry(rewrite(Net(), SPEC, capture=capture))
    state = new.state_dict()
    assert state["_extra_state"] == {"version": 1}
    state["old"] = torch.tensor(7)
    del state["epochs"]
    state["_extra_state"] = {"version": 5}
    new.load_state_dict(state)
    assert new.epochs == 7 and new.version == 5
    assert bake(new).state_dict()["_extra_state"] == {"version": 5}


def test_extra_state_is_there_before_the_code_of_a_large_graph_is_written() -> None:
    class Deep(Net):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(WRITTEN_AT_ONCE):
                x = torch.tanh(x)
            return self.fc(x)

    new = rewrite(Deep(), SPEC, capture="graph")
    assert isinstance(vars(type(new))["forward"], property)
    assert new.state_dict()["_extra_state"] == {"version": 1}


def test_a_class_that_loads_by_itself_takes_plain_weights_inside_another_module() -> None:
    class Loads(Net):
        def _load_from_state_dict(self, *args: Any) -> None:
            self.seen.append("loaded")
            super()._load_from_state_dict(*args)

    class Owner(Loads):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ self.w

    plain = Owner()
    rule = {"name": "w", "select": "w", "chain": ["weight_norm"]}
    new: Any = nn.ModuleDict({"inner": rewrite(Owner(), {"reparam": 1, "rules": [rule]}, capture="graph")})
    new.load_state_dict({f"inner.{name}": value for name, value in plain.state_dict().items()})
    assert new["inner"].seen == ["loaded"]
    x = torch.randn(2, 3)
    torch.testing.assert_close(new["inner"](x), plain(x))
