"""The extent of one forward, inside which every site is evaluated once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from rewriter.io._names import loadable


class Frame:
    """One running forward: the values evaluated in it, and the modes that were on when it began."""

    def __init__(self, given: dict[Any, Any] | None = None) -> None:
        self.values: dict[Any, Any] = dict(given or {})
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()

    def value(self, key: Any, evaluate: Callable[[], Any]) -> Any:
        """Return the value kept for `key`, evaluated under the frame's own modes if it is not there yet.

        A region of the forward may run under no_grad, inference mode or activation checkpointing and be the
        first to ask. The value has to serve the rest of the forward too, so the modes are the frame's, and the
        chain's intermediates stay out of a checkpointed region's saved tensors, which a second run of the region
        would have to reproduce one by one.
        """
        if key in self.values:
            return self.values[key]
        if torch.compiler.is_compiling():
            value = evaluate()
        else:
            with (
                torch.inference_mode(self.inference),
                torch.set_grad_enabled(self.grad),
                torch.autograd.graph.saved_tensors_hooks(_same, _same),
            ):
                value = evaluate()
        self.values[key] = value
        return value


@loadable()
class Session:
    """The forwards now running in one model, one stack for each thread.

    A copied or unpickled model gets a session of its own, with nothing running in it.
    """

    def __init__(self) -> None:
        self._running = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return Session()

    def __copy__(self) -> Session:
        return Session()

    def __reduce__(self) -> tuple[type[Session], tuple[()]]:
        return (Session, ())

    @property
    def frame(self) -> Frame | None:
        """The innermost running forward of this thread."""
        return getattr(self._running, "frame", None)

    def begin(self, frame: Frame) -> Extent:
        """Return a context in which `frame` is the running forward."""
        return Extent(self._running, frame)


class Extent:
    """A `with` block that makes a frame the running one, and puts the former back."""

    def __init__(self, running: threading.local, frame: Frame) -> None:
        self.running = running
        self.entered = frame
        self.former: Frame | None = None

    def __enter__(self) -> Frame:
        self.former = getattr(self.running, "frame", None)
        self.running.frame = self.entered
        return self.entered

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.running.frame = self.former


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
