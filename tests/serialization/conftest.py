"""Modules and functions that are the user's own, not torch's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for hostile.py

USER_CODE = """
import torch
from torch import nn, fx

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.tied = self.fc

    def forward(self, x):
        return self.tied(x).relu()

class Holder(nn.Module):
    def __init__(self, *held):
        super().__init__()
        self.held = held

fired = []

class Bomb:
    def __reduce__(self):
        return fire, ("boom",)

def fire(text):
    fired.append(text)
    return text

def squash(x):
    return x / (1 + x.abs())

fx.wrap("squash")

class Squashing(nn.Module):
    def forward(self, x):
        return squash(x)

def make():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())

def hook(module, args, output):
    return output

not_callable = 3
"""


@pytest.fixture
def user(tmp_path_factory, monkeypatch):
    """A user's package ``their_nets``, importable during one test."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "their_nets.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(str(folder))
    import their_nets

    yield their_nets
    sys.modules.pop("their_nets", None)
