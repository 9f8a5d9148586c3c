"""Activation checkpointing: which region of which forward is replayed.

`torch.utils.checkpoint` runs a region a second time in the backward, long after the forward it belongs to. The replay
has to find the values of this forward: new random numbers or an advanced state would give gradients of another
function. torch has one record for each non-reentrant region, alive as long as the region may be replayed, and reaches
it through the hooks for saved tensors that are on in both runs. Our forward context is stored on that record.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any, cast

import torch
from torch.utils.checkpoint import CheckpointFunction

from rewriter._torch import current_backward, saved_tensor_hooks

_ATTRIBUTE = "_reparam_region"
_FORWARD, _BACKWARD = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__

"""Return what is done to tensors that autograd saves here, ``None`` for nothing; give it True."""


class Region:
    """What one checkpointed region needs to run again.

    Arguments:
        contexts: the model's contexts → the forward context in which the region ran.
        repeated: the model's contexts and a backward's number → the context of the replay.
        states: site → what it had for a state before each of its evaluations in the region.
        replayed: site and number of a backward → how many of them have been repeated there.
    """

    def __init__(self) -> None:
        self.contexts: dict[Any, Any] = {}
        self.repeated: dict[Any, Any] = {}
        self.states: dict[Any, list[Any]] = {}
        self.replayed: dict[Any, int] = {}


def graph_task() -> int | None:
    """Return the number of the backward that this thread runs, ``None`` outside of one."""
    task = current_backward()
    return None if task == -1 else task


def hooks_are_on() -> bool:
    """Say whether anything is done to tensors that autograd saves here."""
    return saved_tensor_hooks(True) is not None


def may_run_again() -> bool:
    """Say, quickly, whether the running code may be in a checkpointed region of either kind."""
    return not torch.is_grad_enabled() or saved_tensor_hooks(True) is not None


def unnoticed() -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which a region does not count what is saved among its own, which would have to come again."""
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def region_of_forward() -> Region | None:
    """Return the checkpointed region that the running code is in, the first time it runs."""
    hooks = saved_tensor_hooks(True)
    return None if hooks is None else _region(_captured(hooks[0], "frame"))


def region_of_backward() -> Region | None:
    """Return the checkpointed region that is being run again."""
    hooks = saved_tensor_hooks(True)
    reference = None if hooks is None else _captured(hooks[0], "target_frame_ref")
    return None if reference is None else _region(reference())


def reentrant_region() -> Region | None:
    """Return the reentrant region that the running code is in, in its first run or when it runs again.

    No hook leads to it: torch has its record in a local variable of the function that runs the region. Looking for it
    takes more than a microsecond.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _FORWARD or frame.f_code is _BACKWARD:  # not every code has a hash: torch.compile's has none
            return _region(frame.f_locals.get("ctx"))
        frame = frame.f_back
    return None


def _captured(hook: Any, name: str) -> Any:
    """Return the variable `name` that torch's hook function captured; None for other hooks."""
    hook = inspect.unwrap(hook)
    code, cells = getattr(hook, "__code__", None), getattr(hook, "__closure__", None) or ()
    if code is None or hook.__module__ != "torch.utils.checkpoint" or name not in code.co_freevars:
        return None
    return cells[code.co_freevars.index(name)].cell_contents


def _region(record: Any) -> Region | None:
    if record is None or not hasattr(record, "__dict__"):
        return None
    return cast(Region, record.__dict__.setdefault(_ATTRIBUTE, Region()))


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
