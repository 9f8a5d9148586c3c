"""The forward context: inside it every site is evaluated once.

The short version is a dict from site to value, made when a forward starts. What makes it longer: a forward may read a
value under `no_grad` first and under grad mode later; a checkpointed region runs again in the backward and needs the
values of its first run; and a read at every time step has to cost next to nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rewriter._torch import functorch_interpreter, when_backward_ends
from rewriter.context._checkpoint import (
    Region,
    graph_task,
    hooks_are_on,
    region_of_backward,
    region_of_forward,
    unnoticed,
)
from rewriter.context._fingerprint import transformed
from rewriter.context._random import devices_in_use, random_states, same_states, set_random_states
from rewriter.context._writes import warn_of_write
from rewriter.errors import RewriterError
from rewriter.serialization._names import loadable

if TYPE_CHECKING:
    from rewriter.sites._site import Site


class ForwardContext:
    """One running forward: the values evaluated in it, and the modes that were on when it began.

    `passing` has the values that are read more than once; a region that may run again notes in which context it found
    them. `known` has those of them that such a region has read and that are the same in a second run. `transposed` has
    the transposes of weights that linear layers read. `lists` has the weights of a recurrent layer for the forward,
    `uses` those for one call of it.
    """

    def __init__(self, given: dict[Any, Any] | None = None) -> None:
        self.values: dict[Any, Any] = dict(given or {})
        self.known: dict[Any, Tensor] = {}
        self.passing: dict[Any, Tensor] = {}
        self.transposed: dict[Any, Tensor] = {}
        self.lists: dict[Any, list[Tensor | None]] = {}
        self.uses: dict[Any, list[Tensor | None] | None] = {}
        self.drawn: dict[Any, Drawn] = {}
        self.versions: dict[Any, int] = {}
        self.grad = torch.is_grad_enabled()
        # torch.compile supports neither the question for inference mode nor the mode.
        self.inference = False if is_compiling() else torch.is_inference_mode_enabled()

    def value(self, site: Site, evaluate: Callable[[], Any]) -> Any:
        """Return the value of `site`, evaluated under the context's own modes at the first read.

        The first read may be in a region under no_grad, inference mode or activation checkpointing. The value serves
        the rest of the forward too, so the modes are those of the context. The intermediates of the chain stay out of
        the saved tensors of a checkpointed region: a second run would have to reproduce them one by one.
        """
        if site in self.values:
            value = self.values[site]
            if isinstance(value, Tensor):
                checked = not is_compiling() and hooks_are_on() and site.repeatable
                (self.known if checked else self.passing)[site] = value
            return value
        value = self.values[site] = evaluate() if is_compiling() else self._evaluate(site, evaluate)
        if not is_compiling():
            self.versions[site] = _version(value)
        return value

    def first_value(self, site: Site) -> Tensor | None:
        """Return what `value` does, for a first read under the context's modes outside checkpointed regions.

        Nearly all reads are of this kind. None if this read is another, or if `site` computes several tensors.
        """
        if site in self.values or site.spec.cache == "never" or len(site.spec.members) > 1:
            return None
        if torch.is_grad_enabled() is not self.grad or torch.is_inference_mode_enabled() is not self.inference:
            return None
        if site.policy.versioned and site.lasting and not transformed():
            value = site.policy.valid_value(())
            if type(value) is Tensor:
                self.values[site] = self.passing[site] = value
                return value
        value = self.values[site] = site(*site.read_inputs()) if site._places else site()
        if not value.is_inference():
            self.versions[site] = value._version
        return value  # type: ignore[no-any-return]

    def _evaluate(self, site: Site, evaluate: Callable[[], Any]) -> Any:
        if hooks_are_on() or (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) != (
            self.grad,
            self.inference,
        ):
            return self._evaluate_apart(site, evaluate)
        return evaluate()

    def _evaluate_apart(self, site: Site, evaluate: Callable[[], Any]) -> Any:
        region = region_of_forward()
        devices = [] if region is None else devices_in_use()
        before = [] if region is None else random_states(devices)
        with (
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.grad),
            unnoticed(),
        ):
            value = evaluate()
        if region is not None:
            after = random_states(devices)
            if not same_states(before, after):
                self.drawn[site] = Drawn(region, devices, before, after)
        return value

    def transpose(self, site: Site) -> None:
        """Keep the transpose of a value that is read more than once, if later reads can use it."""
        value = self.known.get(site, self.passing.get(site))
        if type(value) is not Tensor or value.dim() != 2 or is_compiling() or functorch_interpreter() is not None:
            return
        if (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (self.grad, self.inference):
            self.transposed[site] = value.t()

    def forget(self, site: Site) -> None:
        """Evaluate `site` again at its next read."""
        for values in (self.values, self.known, self.passing, self.transposed, self.versions):
            values.pop(site, None)
        self.lists.clear()
        self.uses.clear()

    def check_writes(self) -> None:
        """Refuse writes of the forward to computed buffers, and warn of writes to computed weights."""
        for site, version in self.versions.items():
            value = self.values[site]
            if (value._version if type(value) is Tensor else _version(value)) == version:
                continue
            record = site.spec
            if record.members[0].kind == "buffer":  # which a forward may mean to write to
                raise RewriterError(
                    f"the forward changed {record.name} in place; it is computed by {' >> '.join(record.chain)} and "
                    "cannot keep the change: assign to it instead, or leave it out of the spec"
                )
            if not site.renormed:
                warn_of_write(record.name, record.chain, "lasts for this forward only")

    def again(self, region: Region) -> ForwardContext:
        """Return the context for the replay of a checkpointed region of this forward.

        The region gets the same values. Where an evaluation drew random numbers in it, the replay skips as many, so
        that the region's own draws are the same.
        """
        return _Again(self, region) if any(drawn.region is region for drawn in self.drawn.values()) else self


class _Second(ForwardContext):
    """The context of a replay, in which no read is a first one."""

    def first_value(self, site: Site) -> None:
        return None


@dataclass(frozen=True)
class Drawn:
    """An evaluation that drew random numbers in a checkpointed region.

    Arguments:
        region: the region.
        devices: their generators are in `before` and `after`, beside the CPU's.
        before: states of the generators.
        after: the same, once the value was there.
    """

    region: Region
    devices: Sequence[int]
    before: Sequence[Tensor]
    after: Sequence[Tensor]

    def skip(self) -> None:
        """Skip what was drawn, if the generators are where they were: a region may not want the same draws."""
        if same_states(self.before, random_states(self.devices)):
            set_random_states(self.devices, self.after)


class _Again(_Second):
    def __init__(self, context: ForwardContext, region: Region) -> None:
        drawn = {site: drawn for site, drawn in context.drawn.items() if drawn.region is region}
        super().__init__({site: value for site, value in context.values.items() if site not in drawn})
        self.context = context
        self.skipped = drawn

    def _evaluate(self, site: Site, evaluate: Callable[[], Any]) -> Any:
        if site not in self.skipped or site not in self.context.values:
            return super()._evaluate(site, evaluate)
        self.skipped[site].skip()
        return self.context.values[site]


class _Repeated(_Second):
    """The context of a replay of which torch does not say to which forward it belongs."""

    def _evaluate(self, site: Site, evaluate: Callable[[], Any]) -> Any:
        value = super()._evaluate(site, evaluate)
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                # A reentrant region differentiates its replay at once: the next one needs a graph of its own.
                tensor.register_hook(lambda gradient: self.forget(site))  # type: ignore[no-untyped-call]
        return value


class _Running(threading.local):
    def __init__(self) -> None:
        # Set from the start: a new attribute makes torch.compile compile again.
        self.context: ForwardContext | None = None
        self.valid: dict[Any, Any] = {}
        """Site → its cached value, found valid when the running forward of a graph started."""


@loadable()
class Contexts:
    """The forward contexts that are running in one model, one for each thread.

    A copied or unpickled model gets an object of its own, with nothing running.
    """

    def __init__(self) -> None:
        self.running = _Running()
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        """The models of this contexts that run a graph."""
        self._repeated: dict[tuple[int, bool], ForwardContext] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Contexts:
        return Contexts()

    def __copy__(self) -> Contexts:
        return Contexts()

    def __reduce__(self) -> tuple[type[Contexts], tuple[()]]:
        return (Contexts, ())

    @property
    def context(self) -> ForwardContext | None:
        """The context of this thread's innermost forward; in a backward, the one whose region is replayed."""
        context = self.running.context
        if is_compiling():
            return context
        if context is None:
            task = graph_task()
            return None if task is None else self._replayed(task)
        region = region_of_forward()
        if region is not None:
            region.contexts[self] = context
        return context

    def begin(self, context: ForwardContext) -> Extent:
        """Return a `with` block in which `context` is the running context."""
        if not is_compiling():
            region = region_of_forward()
            if region is not None:
                region.contexts[self] = context
        return Extent(self.running, context)

    def _replayed(self, task: int) -> ForwardContext:
        region = region_of_backward()
        if region is not None and self in region.contexts:
            if (self, task) not in region.repeated:
                region.repeated[self, task] = region.contexts[self].again(region)
            former: ForwardContext = region.repeated[self, task]
            return former
        key = (task, torch.is_grad_enabled())
        if key not in self._repeated:
            self._repeated[key] = _Repeated()
            forget: Callable[[], Any] = lambda: self._repeated.pop(key, None)  # noqa: E731
            when_backward_ends(forget)
        return self._repeated[key]


class Extent:
    """A `with` block that makes a context the running one, and puts the former back."""

    def __init__(self, running: _Running, context: ForwardContext) -> None:
        self.running = running
        self.entered = context
        self.former: ForwardContext | None = None

    def __enter__(self) -> ForwardContext:
        self.former = self.running.context
        self.running.context = self.entered
        return self.entered

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.running.context = self.former


def _version(value: Any) -> int:
    parts = value if isinstance(value, tuple) else (value,)
    return sum(part._version for part in parts if isinstance(part, Tensor) and not part.is_inference())
