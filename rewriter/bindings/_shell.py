"""Unpickling modules whose class is made at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Shell(nn.Module):
    """A module that has no class yet: it gets one together with its state.

    Pickle makes an object first and gives it its state later, so that objects may refer to each other in a circle.
    Between the two a module of a run-time class is a Shell, which a loader can know by name.

    Arguments:
        become: turns the shell into the module; takes the shell and the state.
    """

    def __init__(self, become: Callable[[nn.Module, dict[str, Any]], None]) -> None:
        super().__init__()
        self.__dict__ = {"become": become}

    def __setstate__(self, state: dict[str, Any]) -> None:
        become = self.__dict__.pop("become")
        become(self, state)
