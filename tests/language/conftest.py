from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CONSTRAINTS = """
import os
from typing import Literal

from torch import nn


class Scale(nn.Module):
    def __init__(self, factor: float, mode: Literal["mul", "div"] = "mul"):
        super().__init__()
        self.factor, self.mode = factor, mode

    def forward(self, X):
        return X * self.factor


class Fold(nn.Module):
    def forward(self, weight, bias):
        return weight, bias


class Window(nn.Module):
    def __init__(self, weight, sizes: tuple[int, ...], names: list[str] | None = None, anything=None):
        super().__init__()

    def forward(self, X):
        return X


class Bound(nn.Module):
    def __init__(self, by: int | float | None = None, at: "NotDefinedAnywhere" = None, odd: 5 = 0):
        super().__init__()


class Open(nn.Module):
    def __init__(self, **options):
        super().__init__()


class NoModule:
    pass


one = Scale(1.0)


def __getattr__(name):
    if name == "Lazy":
        raise ImportError("the compiled part is missing")
    raise AttributeError(name)


def half(size, times: int = 1) -> nn.Module:
    return Scale(0.5**times)
"""


@pytest.fixture(autouse=True)
def my_pkg(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's package `my_pkg.constraints` on the path, imported by nobody before the test."""
    package = tmp_path_factory.mktemp("site") / "my_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "constraints.py").write_text(CONSTRAINTS)
    (package / "broken.py").write_text("raise ValueError('not today')\n")
    (package / "leaves.py").write_text("import sys; sys.exit(3)\n")
    (package / "needy.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(package.parent))
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]
