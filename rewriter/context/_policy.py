"""The policy of one site: which value it has, and until when it is valid.

``forward`` and ``never`` evaluate; ``version`` caches a value across forwards; a frozen site has the value that it had;
inside `evaluate_once` one evaluation serves all forwards. The forward context asks the policy once per forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from rewriter._given import is_managed
from rewriter._torch import autocast_on
from rewriter.context._fingerprint import PLAIN, Fingerprint, same_objects, transformed, versions_of
from rewriter.context._random import devices_of, random_states, same_states
from rewriter.context._writes import ReadOutside, read_outside

if TYPE_CHECKING:
    from rewriter.context._fused import Merged
    from rewriter.context._once import Once
    from rewriter.sites._site import Site


class _FusedSteps:
    """Counts the steps of fused optimizers: torch counts no write of theirs to a parameter."""

    count = 0
    watching = False

    @classmethod
    def watch(cls) -> None:
        """Count from now on."""
        if not cls.watching:
            cls.watching = True
            register_optimizer_step_post_hook(cls._note)

    @classmethod
    def _note(cls, optimizer: Any, *_: Any) -> None:
        if any(group.get("fused") for group in optimizer.param_groups):
            cls.count += 1


class Policy:
    """The values that a site has beyond a forward. It belongs to one site object: copies and pickles start without.

    Arguments:
        versioned: whether the rule says ``cache: version``.
        frozen: whether the site is frozen.
    """

    def __init__(self, versioned: bool = False, frozen: bool = False) -> None:
        self.versioned = versioned
        self.frozen = frozen
        self.busy = versioned or frozen
        """Whether an evaluation has to ask here at all."""
        self.frozen_at: tuple[Any, list[Tensor], list[int]] | None = None
        """The value of a frozen site, the originals that it had, and how often the value had been written to."""
        self.cached: dict[str, CachedValue] = {}
        self.merged: dict[int, Merged] = {}
        """The module that is evaluated in place of neighbouring steps, by the first one's index."""
        self.once_by_thread: dict[int, Once] = {}
        """The `evaluate_once` of each thread, by the thread's number: a thread ends no context but its own."""
        self.outside: list[ReadOutside] = []
        """The tensors of the last value that was read outside a forward."""
        self._lock = threading.Lock()

    def invalidate(self) -> None:
        """Drop the cached values; a frozen site is evaluated again at its next use."""
        self.cached = {}
        self.merged = {}
        self.frozen_at = None

    def freeze(self, frozen: bool) -> None:
        """Keep the value from now on, or no longer."""
        self.frozen = frozen
        self.invalidate()
        self._update()

    def begin(self, once: Once) -> None:
        """Let `once` answer for this thread."""
        with self._lock:
            self.once_by_thread = {**self.once_by_thread, threading.get_ident(): once}
            self._update()

    def end(self) -> None:
        """End this thread's context."""
        with self._lock:
            self.once_by_thread = {
                key: once for key, once in self.once_by_thread.items() if key != threading.get_ident()
            }
            self._update()

    @property
    def once(self) -> Once | None:
        """The `evaluate_once` that this thread is in."""
        return self.once_by_thread.get(threading.get_ident())

    def value(self, site: Site, inputs: Sequence[Tensor]) -> Any:
        """Return the site's value: a valid one if there is one, else a new one."""
        self.check_outside()
        if self.frozen:
            return self.frozen_value(site, inputs)
        if torch.compiler.is_compiling():
            return site.advance(*inputs)
        once = self.once
        if once is not None:
            return once.value(site, inputs)
        if self.versioned:
            return self.cache("value", site, len(site.spec.chain), inputs, site.advance)
        return site.advance(*inputs)

    def evaluates(self) -> bool:
        """Say whether each forward evaluates the site: no value lasts longer."""
        self.check_outside()
        return not self.busy

    def valid_value(self, inputs: Sequence[Tensor]) -> Any:
        """Return the value cached in an earlier forward if it is valid and nothing is `transformed`; else None.

        Arguments:
            inputs: the tensors that the site reads beside its own.
        """
        cached = self.across_forwards()
        return cached.value if cached is not None and cached.is_valid(inputs) else None

    def across_forwards(self) -> CachedValue | None:
        """Return the value that is cached across forwards, if this thread may use it; it may not be valid."""
        if self.frozen or self.once_by_thread or self.outside:
            return None
        return self.cached.get("value")

    def frozen_value(self, site: Site, inputs: Sequence[Tensor]) -> Any:
        """Return the value that the site had when it was frozen; other originals in its place are evaluated.

        So are those that `fully_shard` manages: a cached value would be whole in every process.
        """
        if is_managed(site):
            with torch.no_grad():
                return _detached(site.settled().evaluate(*inputs))
        own = site.originals
        if self.frozen_at is not None and same_objects(own, self.frozen_at[1]):
            value, _, versions = self.frozen_at
            if torch.compiler.is_compiling() or site.renormed or versions_of(value) == versions:
                return value
            self.frozen_at = None  # a forward wrote to it, or somebody to what the forward returned
        if torch.compiler.is_compiling() or transformed() or self.frozen_at is not None:
            return site.settled().evaluate(*inputs)
        with torch.inference_mode(False), torch.no_grad():
            value = _detached(site.settled().evaluate(*inputs))
        self.take_frozen(site, value)
        return value

    def take_frozen(self, site: Site, value: Any) -> None:
        """Give a frozen site its value, until it has other originals."""
        self.frozen_at = (value, site.originals, versions_of(value))

    def read(self, site: Site, value: Any, inputs: Sequence[Tensor]) -> Any:
        """Return a value that is read outside a forward, and remember it, to warn of a write that is lost."""
        if self.frozen:  # the cached value, which serves later forwards too
            value = tuple(part.clone() for part in value) if isinstance(value, tuple) else value.clone()
        if not torch.compiler.is_compiling():
            self.check_outside()
            stored = [*site.parameters(), *site.buffers(), *(one for one in inputs if isinstance(one, Parameter))]
            self.outside = read_outside(site.spec.name, site.spec.chain, value, stored)
            self._update()
        return value

    def check_outside(self) -> None:
        """Warn if what was read outside a forward was changed since, and forget it."""
        if not self.outside or torch.compiler.is_compiling() or transformed():
            return
        outside, self.outside = self.outside, []
        self._update()
        for one in outside:
            one.warn()

    def forgive(self, value: object) -> None:
        """Forget a tensor that was read outside a forward and is assigned: a change of it is not lost."""
        for one in self.outside:
            if one.value is value:
                one.forgive()
        self.outside = [one for one in self.outside if one.value is not value]
        self._update()

    def cache(self, key: str, site: Site, count: int, inputs: Sequence[Tensor], evaluate: Callable[..., Any]) -> Any:
        """Return the value cached under `key` if it is valid, else evaluate and cache.

        A value is not cached if gradients flow through it, if it was drawn or advanced a state, or under a transform
        or a trace.

        Arguments:
            key: one for each value that is cached.
            site: whose.
            count: the value is the result of so many of the site's first steps.
            inputs: the tensors that they read beside their originals.
            evaluate: makes the value from `inputs`.
        """
        if transformed():
            return evaluate(*inputs)
        cached = self.cached.get(key)
        if cached is not None and cached.is_valid(inputs):
            return cached.value
        tensors = [*site.originals[: sum(site.spec.stored[:count])], *inputs]
        if _capturing(tensors):
            return evaluate(*inputs)
        self.cached.pop(key, None)
        before = Fingerprint(site.steps[:count], tensors, owners=[site])
        grad = torch.is_grad_enabled()
        if not before.trusted or not before.repeatable or any(map(_shared, before.tensors)):
            return evaluate(*inputs)
        if grad and before.trained():
            return evaluate(*inputs)
        devices = devices_of(before.tensors)
        modes, generators = _modes(tensors), random_states(devices)
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            value = evaluate(*inputs)
            if not grad:
                value = _detached(value)  # a chain may give an original itself
        drawn = not same_states(generators, random_states(devices))
        if before.unchanged() and not drawn and _cacheable(value):
            if before.trained():
                _FusedSteps.watch()
            self.cached[key] = CachedValue(value, before, modes, inputs, tensors[:1])
        return value

    def _update(self) -> None:
        self.busy = self.versioned or self.frozen or bool(self.once_by_thread) or bool(self.outside)


class CachedValue:
    """A value, and everything that has to be as it was for the value to be valid.

    Arguments:
        value: a tensor, or a tuple of them.
        fingerprint: of what it was computed from.
        modes: those that were on, see `_modes`.
        inputs: the tensors that were given.
        first: one of the tensors, whose device counts.
    """

    def __init__(
        self,
        value: Any,
        fingerprint: Fingerprint,
        modes: tuple[Any, ...],
        inputs: Sequence[Tensor],
        first: Sequence[Tensor],
    ) -> None:
        self.value = value
        self.fingerprint = fingerprint
        self.modes = modes
        self.inputs = tuple(inputs)
        self.first = first
        self.versions = versions_of(value)
        self.fused_steps = _FusedSteps.count
        self.trained = bool(fingerprint.trained())

    def is_valid(self, inputs: Sequence[Tensor]) -> bool:
        """Say whether nothing has changed, the value itself included: an embedding with `max_norm` writes to it."""
        if not self.same_modes() or not self.unwritten():
            return False
        return (not inputs or same_objects(inputs, self.inputs)) and self.fingerprint.unchanged()

    def same_modes(self) -> bool:
        """Say whether the grad mode, inference mode, autocast and stream are as they were."""
        grad, inference, cast, stream = self.modes
        if torch.is_grad_enabled() is not grad or torch.is_inference_mode_enabled() is not inference:
            return False
        plain = not (cast or stream or autocast_on())
        return plain or self.modes == _modes(self.first)

    def unwritten(self) -> bool:
        """Say whether nothing was written to the value itself, nor by a fused optimizer to what it is made of."""
        if self.trained and self.fused_steps != _FusedSteps.count:
            return False
        value = self.value
        if type(value) is tuple:
            return [part._version for part in value] == self.versions
        return value._version == self.versions[0]  # type: ignore[no-any-return]


def _tensors(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _detached(value: Any) -> Any:
    return tuple(part.detach() for part in value) if isinstance(value, tuple) else value.detach()


def _shared(tensor: Tensor) -> bool:
    """Say whether another process may write to the tensor: no counter of this process would show it."""
    return not tensor.is_cuda and tensor.is_shared()  # type: ignore[no-untyped-call]


def _cacheable(value: Any) -> bool:
    return all(type(part) in PLAIN and not part.requires_grad and not part.is_inference() for part in _tensors(value))


def _modes(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    cast = stream = None
    if autocast_on():
        kinds = sorted({tensor.device.type for tensor in tensors} | {"cpu"})
        cast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
    if tensors and tensors[0].is_cuda and not _capturing(tensors):  # nothing is cached while a graph is captured
        stream = torch.cuda.current_stream(tensors[0].device)
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast, stream)


def _capturing(tensors: Sequence[Tensor]) -> bool:
    # A CUDA graph replays what it recorded: a cached value in it would never change again.
    return bool(tensors) and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
