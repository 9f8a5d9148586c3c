"""Fixtures that run the command in this process and capture stdout and stderr separately."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest
import torch
from torch import nn

from rewriter.cli import main

SPEC = """\
reparam: 1
rules:
  - name: even
    select: "*.weight"
    chain: [symmetric]
"""

USER_CODE = """
import torch
from torch import nn

print("imported by", __name__)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
    def forward(self, x):
        return self.fc(x)

class Scale(nn.Module):
    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = factor
    def forward(self, X):
        return X * self.factor
    def right_inverse(self, value):
        return value / self.factor

class Noise(nn.Module):
    def forward(self, X):
        return X + torch.rand_like(X)

class Broken(nn.Module):
    def forward(self, X):
        raise LookupError("the user's own mistake")

def make():
    return nn.Sequential(nn.Linear(4, 4))

def fail():
    raise LookupError("the user's own mistake")
"""


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def reparam(capsys):
    """Run `reparam` with the given arguments; a traceback fails the test."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err or "--debug" in arguments
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def refused(reparam):
    """Check that a command fails with a code and a message, as text and as JSON, and prints nothing else."""

    def check(arguments: tuple[object, ...], code: int, message: str) -> None:
        result = reparam(*arguments)
        assert (result.code, result.out) == (code, "")
        assert message in result.err
        error = reparam(*arguments, "--json").json["error"]
        assert error["exit_code"] == code
        assert message in error["message"]

    return check


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a spec, a model and a Python module."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "their_code.py").write_text(USER_CODE)
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), tmp_path / "model.pt")
    yield tmp_path
    sys.modules.pop("their_code", None)
