"""Saying that a write in place to a computed tensor is lost, as PyTorch counts such writes.

A model whose weight is computed reads like one that stores it: `nn.init` and `copy_` take the value, write to it, and
nothing keeps what they wrote.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from rewriter.context._fingerprint import PLAIN, transformed

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Watches:
    """What warns of writes to the parts of one value."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[weakref.finalize[..., Any]] = []

    def add(self, part: Tensor, name: str, chain: Sequence[str]) -> None:
        """Watch `part`."""
        shadow = part.detach()  # counts with it
        watch = weakref.finalize(part, _compare, name, tuple(chain), shadow, shadow._version)
        watch.atexit = False
        self._parts.append(watch)

    def forgive(self, value: object) -> None:
        """Stop watching a value that was assigned: its change is not lost."""
        for watch in self._parts:
            alive = watch.peek()
            if alive is not None and alive[0] is value:
                watch.detach()


def watch_writes(name: str, chain: Sequence[str], value: Any, stored: Sequence[Tensor]) -> Watches:
    """Warn, once nobody has `value` any more, if it was written to meanwhile.

    Arguments:
        name: what it is the value of.
        chain: what computes it.
        value: a tensor, or a tuple of them.
        stored: the tensors it is computed from; a value in their memory keeps what is written to it.

    Returns:
        What will warn.
    """
    watches = Watches()
    if transformed():
        return watches
    homes = {tensor.untyped_storage()._cdata for tensor in stored if type(tensor) in PLAIN}
    for part in value if isinstance(value, tuple) else (value,):
        if type(part) in PLAIN and not part.is_inference() and part.untyped_storage()._cdata not in homes:
            watches.add(part, name, chain)
    return watches


class ReadOutside:
    """A value that was read outside a forward: writes through its ``.data`` count nowhere, so its content is compared.

    Arguments:
        value: the value.
    """

    def __init__(self, value: Tensor) -> None:
        self.shadow = value.detach()
        self.version = self.shadow._version
        self.content = torch.hash_tensor(self.shadow)
        self.line = _line_of_caller()
        """File and line of the read: a write through ``.data`` stands at the same line."""

    def changed(self) -> bool:
        """Whether the content changed, and torch counted no write to it."""
        return self.shadow._version == self.version and not torch.equal(torch.hash_tensor(self.shadow), self.content)


def read_outside(value: Any, stored: Sequence[Tensor]) -> ReadOutside | None:
    """Return what remembers the content of `value`, if a write to it would be lost."""
    if transformed() or type(value) not in PLAIN or value.is_inference() or not value.is_floating_point():
        return None
    if value.is_meta or value.untyped_storage()._cdata in {tensor.untyped_storage()._cdata for tensor in stored}:
        return None
    return ReadOutside(value)


def warn_of_write(
    name: str, chain: Sequence[str], change: str, stacklevel: int = 2, line: tuple[str, int] | None = None
) -> None:
    """Warn that `name` was written to, and say what becomes of the change.

    Arguments:
        name: the tensor.
        chain: what computes it.
        change: what becomes of the change.
        stacklevel: of the line to blame, where `line` is not known.
        line: file and line to blame.
    """
    text = (
        f"{name} was changed in place; it is computed by {' >> '.join(chain)}, and the change {change}: assign to it, "
        f"as in module.{name.rpartition('.')[2]} = value, or use rewriter.state.set_value"
    )
    if line is None:
        warnings.warn(text, stacklevel=stacklevel)
    else:
        warnings.warn_explicit(text, UserWarning, *line)


def _line_of_caller() -> tuple[str, int]:
    """Return file and line of the innermost frame outside this package."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return ("<unknown>", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def _compare(name: str, chain: Sequence[str], shadow: Tensor, version: int) -> None:
    if shadow._version != version:
        warn_of_write(name, chain, "is lost", stacklevel=4)  # the line at which the value was given up
