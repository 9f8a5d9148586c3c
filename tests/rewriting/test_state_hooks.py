"""What a model's class does to its state dict is done by the rewritten model, too."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, rewrite

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


@pytest.mark.parametrize("capture", ["graph", "module"])
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
