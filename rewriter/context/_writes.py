"""Saying that a write in place to a computed tensor is lost, as PyTorch counts such writes.

A model whose weight is computed reads like one that stores it: `nn.init` and `copy_` take the value, write to it, and
nothing keeps what they wrote.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.context._fingerprint import PLAIN, transformed


def watch_writes(name: str, chain: Sequence[str], value: Any, stored: Sequence[Tensor]) -> None:
    """Warn, once nobody has `value` any more, if it was written to meanwhile.

    Arguments:
        name: what it is the value of.
        chain: what computes it.
        value: a tensor, or a tuple of them.
        stored: the tensors it is computed from; a value in their memory keeps what is written to it.
    """
    if transformed():
        return
    homes = {tensor.untyped_storage()._cdata for tensor in stored if type(tensor) in PLAIN}
    for part in value if isinstance(value, tuple) else (value,):
        if type(part) in PLAIN and not part.is_inference() and part.untyped_storage()._cdata not in homes:
            shadow = part.detach()  # counts with it
            weakref.finalize(part, _compare, name, tuple(chain), shadow, shadow._version).atexit = False


class ReadOutside:
    """A value that was read outside a forward: writes through its ``.data`` count nowhere, so its content is compared.

    Arguments:
        value: the value.
    """

    def __init__(self, value: Tensor) -> None:
        self.shadow = value.detach()
        self.version = self.shadow._version
        self.content = torch.hash_tensor(self.shadow)

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


def warn_of_write(name: str, chain: Sequence[str], change: str, stacklevel: int = 2) -> None:
    """Warn that `name` was written to, and say what becomes of the change."""
    warnings.warn(
        f"{name} was changed in place; it is computed by {' >> '.join(chain)}, and the change {change}: assign to it, "
        f"as in module.{name.rpartition('.')[2]} = value, or use rewriter.state.set_value",
        stacklevel=stacklevel,
    )


def _compare(name: str, chain: Sequence[str], shadow: Tensor, version: int) -> None:
    if shadow._version != version:
        warn_of_write(name, chain, "is lost", stacklevel=4)  # the line at which the value was given up
