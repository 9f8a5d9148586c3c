"""Gradients that show whether something else than a backward changed them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter._torch import without_subclasses


class WatchedGradient:
    """Stands for a tensor's gradient while it is watched: the same memory, or zeros if there is no gradient.

    Arguments:
        tensor: whose.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.before = tensor.grad
        self.grad = (torch.zeros_like(tensor) if self.before is None else self.before).as_subclass(_Watched)
        tensor.grad = self.grad
        self.start = self.version = self.grad._version
        self.hook = tensor.register_post_accumulate_grad_hook(self._add)  # type: ignore[no-untyped-call]

    @property
    def touched(self) -> bool:
        """Whether it was changed by anything but a backward."""
        return self.tensor.grad is self.grad and (self.grad.written or self.grad._version != self.version)

    def leave(self) -> None:
        """Give the tensor its gradient or its lack of one back, or an ordinary one where a gradient came."""
        self.hook.remove()
        if not self.tensor._post_accumulate_grad_hooks:
            # torch leaves an empty dict, and calls no hook any more that is put into it after a swap of the tensor.
            self.tensor._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        if self.tensor.grad is self.grad:
            self.tensor.grad = self.grad.plain() if self.before is None and self._came() else self.before

    def _came(self) -> bool:
        """Whether a backward added to it; our hook may be among those that torch does not call, see `leave`."""
        return self.version != self.start or (self.grad._version != self.start and not self.grad.written)

    def _add(self, tensor: Tensor) -> None:
        self.version = self.grad._version
        self.grad.written = False


def is_watchable(gradient: Tensor | None) -> bool:
    """Whether something can stand for a gradient, and nothing does yet."""
    return gradient is None or (type(gradient) is Tensor and gradient.layout is torch.strided)


def is_still(gradient: Tensor | None, before: Tensor) -> bool:
    """Whether a gradient is the one from before, which is an ordinary tensor again when the block it is of ends."""
    if gradient is before or gradient is None or not isinstance(before, _Watched):
        return gradient is before
    return gradient.layout is before.layout and gradient.data_ptr() == before.data_ptr()


class _Watched(Tensor):
    """A tensor that notices when a function is about to write to it.

    Its version counter shows most writes, but not those of `torch.amp.GradScaler.unscale_`.
    """

    written = False

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            for argument in args:
                for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                    if isinstance(tensor, _Watched):
                        tensor.written = True
        with without_subclasses():
            return func(*args, **(kwargs or {}))

    def plain(self) -> Tensor:
        """Return this as an ordinary tensor."""
        with without_subclasses():
            return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.plain().clone()
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
