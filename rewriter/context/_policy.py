"""Which value of a site is held, and until when: across forwards, until unfrozen, or inside `evaluate_once`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter.context._fingerprint import PLAIN, TRAINED, same_objects, sign, transformed
from rewriter.context._random import devices_of, random_states, same_states
from rewriter.context._watch import Watch
from rewriter.context._writes import ReadOutside, read_outside, warn_of_write

if TYPE_CHECKING:
    from rewriter.context._fused import Merged
    from rewriter.context._once import Once
    from rewriter.sites._site import ParametrizedTensor


class Holding:
    """The values that a site holds beyond a forward. It belongs to one site object: no copy or pickle takes it along.

    Arguments:
        versioned: whether the site's policy is ``version``.
        frozen: whether the site is frozen.
    """

    def __init__(self, versioned: bool = False, frozen: bool = False) -> None:
        self.versioned = versioned
        self.frozen = frozen
        self.busy = versioned or frozen
        self.fixed: Any = None
        self.fixed_tensors: list[Tensor] = []
        self.kept: dict[str, Kept] = {}
        self.merged: dict[int, Merged] = {}
        """What is evaluated in place of neighbouring steps, by the first one's index."""
        self.contexts: dict[int, Once] = {}
        """The `evaluate_once` that each thread is in, by the thread's number: a thread ends no context but its own."""
        self.outside: ReadOutside | None = None
        """The last value that was read outside a forward."""
        self._lock = threading.Lock()

    def drop(self) -> None:
        """Forget what is held; a frozen site is evaluated again when it is next asked."""
        self.kept = {}
        self.merged = {}
        self.fixed, self.fixed_tensors = None, []

    def freeze(self, frozen: bool) -> None:
        """Hold the value from now on, or no longer."""
        self.frozen = frozen
        self.drop()
        self._update()

    def begin(self, once: Once) -> None:
        """Let `once` answer for this thread."""
        with self._lock:
            self.contexts = {**self.contexts, threading.get_ident(): once}
            self._update()

    def end(self) -> None:
        """Take this thread's context away."""
        with self._lock:
            self.contexts = {key: once for key, once in self.contexts.items() if key != threading.get_ident()}
            self._update()

    @property
    def once(self) -> Once | None:
        """The context that this thread is in."""
        return self.contexts.get(threading.get_ident())

    def value(self, site: ParametrizedTensor, inputs: Sequence[Tensor]) -> Any:
        """Return the site's value: the one that is held where it still holds, else a new one."""
        if self.outside is not None:
            self.check_outside(site)
        if self.frozen:
            return self.frozen_value(site, inputs)
        if torch.compiler.is_compiling():
            return site.advance(*inputs)
        once = self.once
        if once is not None:
            return once.value(site, inputs)
        if self.versioned:
            return self.keep("value", site, len(site.record.chain), inputs, site.advance)
        return site.advance(*inputs)

    def kept_value(self, inputs: Sequence[Tensor]) -> Any:
        """Return the value kept from an earlier forward, where nothing is `transformed`; else ``None``.

        Arguments:
            inputs: the tensors that the site reads beside its own.
        """
        if self.frozen or self.contexts or self.outside is not None:
            return None
        kept = self.kept.get("value")
        return kept.value if kept is not None and kept.holds(inputs) else None

    def lasting_value(self) -> Kept | None:
        """Return what is cached across forwards, if this thread may use it; it may not be valid."""
        return None if self.frozen or self.contexts or self.outside is not None else self.kept.get("value")

    def frozen_value(self, site: ParametrizedTensor, inputs: Sequence[Tensor]) -> Any:
        """Return the value that the site had when it was frozen; other tensors in its place are evaluated."""
        own = site.originals
        if self.fixed is not None and same_objects(own, self.fixed_tensors):
            return self.fixed
        if torch.compiler.is_compiling() or transformed() or (self.fixed is not None):
            return site.settled().evaluate(*inputs)
        with torch.inference_mode(False), torch.no_grad():
            self.fixed = _detached(site.settled().evaluate(*inputs))
        self.fixed_tensors = own
        return self.fixed

    def read(self, site: ParametrizedTensor, value: Any) -> None:
        """Remember a value that was read outside a forward, to warn of a write that is lost."""
        self.outside = read_outside(value, site.originals)
        self._update()

    def check_outside(self, site: ParametrizedTensor) -> None:
        """Warn if somebody wrote to the value that was read outside a forward."""
        outside, self.outside = self.outside, None
        self._update()
        if outside is not None and outside.changed():
            warn_of_write(site.record.name, site.record.chain, "is lost", stacklevel=6)

    def keep(
        self, key: str, site: ParametrizedTensor, count: int, inputs: Sequence[Tensor], evaluate: Callable[..., Any]
    ) -> Any:
        """Return the value kept under `key` while nothing it depends on has changed, else evaluate and keep.

        Nothing is kept that gradients flow through, that was drawn or that advanced a state, nor anything under a
        transform or a trace.

        Arguments:
            key: one for each thing that is kept.
            site: whose.
            count: how many of the site's first steps the value is the result of.
            inputs: the tensors that they read beside those that are stored.
            evaluate: makes the value from `inputs`.
        """
        if transformed():
            return evaluate(*inputs)
        kept = self.kept.get(key)
        if kept is not None and kept.holds(inputs):
            return kept.value
        modules = site.steps[:count]
        tensors = [*site.originals[: sum(site.record.stored[:count])], *inputs]
        if _capturing(tensors):
            return evaluate(*inputs)
        self.kept.pop(key, None)
        before = sign(modules, tensors)
        if before is None or not before.repeatable or any(map(_shared, before.tensors)):
            return evaluate(*inputs)
        if torch.is_grad_enabled() and any(entry[TRAINED] for entry in before.marks):
            return evaluate(*inputs)
        grad = torch.is_grad_enabled()
        devices = devices_of(before.tensors)
        modes, generators = _modes(tensors), random_states(devices)
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            value = evaluate(*inputs)
            if not grad:
                value = _detached(value)  # a chain may give the stored tensor itself
        drawn = not same_states(generators, random_states(devices))
        if sign(modules, tensors) == before and not drawn and _keepable(value):
            self.kept[key] = Kept(value, Watch(modules, tensors, holders=[site]), modes, inputs, tensors[:1])
        return value

    def _update(self) -> None:
        self.busy = self.versioned or self.frozen or bool(self.contexts) or self.outside is not None


class Kept:
    """A value, and everything that has to be as it was for the value to hold.

    Arguments:
        value: a tensor, or a tuple of them.
        watch: over what it was computed from.
        modes: that were on, as `_modes` tells them.
        inputs: the tensors that were given.
        first: one of the tensors, which tells the device.
    """

    def __init__(
        self, value: Any, watch: Watch, modes: tuple[Any, ...], inputs: Sequence[Tensor], first: Sequence[Tensor]
    ) -> None:
        self.value = value
        self.watch = watch
        self.modes = modes
        self.inputs = tuple(inputs)
        self.first = first
        self.versions = [part._version for part in _tensors(value)]

    def holds(self, inputs: Sequence[Tensor]) -> bool:
        """Whether nothing has changed, the value itself included: an embedding with `max_norm` writes into it."""
        if not self.same_modes() or not self.unwritten():
            return False
        return (not inputs or same_objects(inputs, self.inputs)) and self.watch.unchanged()

    def same_modes(self) -> bool:
        """Whether the grad mode, inference mode, autocast and stream are as they were."""
        grad, inference, cast, stream = self.modes
        if torch.is_grad_enabled() is not grad or torch.is_inference_mode_enabled() is not inference:
            return False
        plain = not (cast or stream or torch._C._is_any_autocast_enabled())
        return plain or self.modes == _modes(self.first)

    def unwritten(self) -> bool:
        """Whether nobody wrote to the value itself."""
        value = self.value
        if type(value) is tuple:
            return [part._version for part in value] == self.versions
        return value._version == self.versions[0]  # type: ignore[no-any-return]


def _tensors(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _detached(value: Any) -> Any:
    return tuple(part.detach() for part in value) if isinstance(value, tuple) else value.detach()


def _shared(tensor: Tensor) -> bool:
    """Whether another process may write to the tensor: no counter of this one would tell."""
    return not tensor.is_cuda and tensor.is_shared()  # type: ignore[no-untyped-call]


def _keepable(value: Any) -> bool:
    return all(type(part) in PLAIN and not part.requires_grad and not part.is_inference() for part in _tensors(value))


def _modes(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    cast = stream = None
    if torch._C._is_any_autocast_enabled():
        cast = tuple(
            (kind, torch.get_autocast_dtype(kind)) for kind in _kinds(tensors) if torch.is_autocast_enabled(kind)
        )
    if tensors and tensors[0].is_cuda:
        stream = None if _capturing(tensors) else torch.cuda.current_stream(tensors[0].device)  # None: of no kept value
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast, stream)


def _kinds(tensors: Sequence[Tensor]) -> list[str]:
    return sorted({tensor.device.type for tensor in tensors} | {"cpu"})


def _capturing(tensors: Sequence[Tensor]) -> bool:
    # A CUDA graph replays what it recorded: a kept value in it would never change again.
    return bool(tensors) and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
