"""What a source of parametrized tensors says about one tensor that it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

Place = tuple[nn.Module, str]
"""A module and the name of a tensor in it."""


@dataclass(frozen=True)
class Holder:
    """One tensor that something else than this package computes.

    Arguments:
        source: who computes it, such as ``torch.parametrize``.
        owner: the module that reads it.
        tensor: its name there.
        stored: where the tensors are that it is computed from, in the order of the first step's inputs.
        steps: returns the parametrizations that compute it; the model stays as it is.
        release: takes hooks, class and stored tensors off the model; the tensor is gone afterwards.
        kind: ``"parameter"`` or ``"buffer"``.
    """

    source: str
    owner: nn.Module
    tensor: str
    stored: tuple[Place, ...]
    steps: Callable[[], list[nn.Module]]
    release: Callable[[], None]
    kind: str = "parameter"

    @property
    def place(self) -> Place:
        """Where the tensor is read."""
        return (self.owner, self.tensor)
