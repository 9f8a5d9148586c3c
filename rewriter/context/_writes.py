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


class ReadOutside:
    """A tensor that was read outside a forward: what is written to it, or set on it, is lost.

    It refers to the tensor, since what is set on a tensor is gone with it. A later read takes its place; writes that
    torch counts are noticed even then, when nobody has the tensor any more.

    Arguments:
        value: the tensor.
        name: what it is the value of.
        chain: what computes it.
    """

    __slots__ = ("_end", "chain", "content", "line", "name", "shadow", "trained", "value", "version")

    def __init__(self, value: Tensor, name: str, chain: Sequence[str]) -> None:
        self.value, self.name, self.chain = value, name, tuple(chain)
        self.trained = value.requires_grad
        self.shadow = value.detach()  # counts with it
        self.version = self.shadow._version
        self.content = self._content()
        self.line = _line_of_caller()
        """File and line of the read: a write stands at the same line."""
        self._end = weakref.finalize(value, _compare, name, self.chain, self.shadow, self.version, self.line)
        self._end.atexit = False

    def forgive(self) -> None:
        """Say nothing of it: it is assigned, with what was written to it."""
        self._end.detach()

    def warn(self) -> None:
        """Warn of what was written to it and set on it, however that was done."""
        if self.value.requires_grad is not self.trained:
            text = (
                f"requires_grad of {self.name} was set to {not self.trained}, which changes nothing in the model: "
                f"{self.name} is computed by {' >> '.join(self.chain)}. Use rewriter.state.freeze and unfreeze, or set "
                "requires_grad of the parameters in rewriter.state.named_sites(model)"
            )
            warnings.warn_explicit(text, UserWarning, *self.line)
        if self._written():
            self._end.detach()
            warn_of_write(self.name, self.chain, "is lost", line=self.line)

    def _written(self) -> bool:
        value, shadow = self.value, self.shadow
        if (value.data_ptr(), value.shape) != (shadow.data_ptr(), shadow.shape):  # `value.data = other`
            return True
        return shadow._version != self.version or not torch.equal(self._content(), self.content)

    def _content(self) -> Tensor:
        # No counter shows a write through ``.data``.
        numbers = self.shadow.is_floating_point() and not self.shadow.is_meta
        return torch.hash_tensor(self.shadow) if numbers else torch.empty(0)


def read_outside(name: str, chain: Sequence[str], value: Any, stored: Sequence[Tensor]) -> list[ReadOutside]:
    """Return what warns of writes to a value that was read outside a forward.

    Arguments:
        name: what it is the value of.
        chain: what computes it.
        value: a tensor, or a tuple of them.
        stored: the tensors it is computed from; a value in their memory keeps what is written to it.
    """
    if transformed():
        return []
    homes = {tensor.untyped_storage()._cdata for tensor in stored if type(tensor) in PLAIN}
    return [
        ReadOutside(part, name, chain)
        for part in (value if isinstance(value, tuple) else (value,))
        if type(part) in PLAIN and not part.is_inference() and part.untyped_storage()._cdata not in homes
    ]


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
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return ("<unknown>", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def _compare(name: str, chain: Sequence[str], shadow: Tensor, version: int, line: tuple[str, int]) -> None:
    if shadow._version != version:
        warn_of_write(name, chain, "is lost", line=line)
