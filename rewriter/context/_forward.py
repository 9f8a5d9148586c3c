"""The extent of one forward, inside which every site is evaluated once."""

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
    from rewriter.sites._site import ParametrizedTensor

_interpreter = torch._C._functorch.peek_interpreter_stack


class Frame:
    """One running forward: the values evaluated in it, and the modes that were on when it began.

    `passing` holds the values that are read time and again; a region that may run again has to note which frame it
    found them in. `known` holds those of them that such a region has read and that would be the same in a second run.
    `transposed` holds the transposes of those that linear layers read, `lists` all that a module of torch's reads,
    `uses` the same for one call of such a module, while the forward is in it.
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
        # torch.compile can neither ask for inference mode nor enter it.
        self.inference = False if is_compiling() else torch.is_inference_mode_enabled()

    def value(self, site: ParametrizedTensor, evaluate: Callable[[], Any]) -> Any:
        """Return the value kept for `site`, evaluated under the frame's own modes if it is not there yet.

        A region of the forward may run under no_grad, inference mode or activation checkpointing and be the
        first to ask. The value has to serve the rest of the forward too, so the modes are the frame's, and the
        chain's intermediates stay out of a checkpointed region's saved tensors, which a second run of the region
        would have to reproduce one by one.
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

    def first_value(self, site: ParametrizedTensor) -> Tensor | None:
        """Return what `value` does, for a first read under the frame's modes that no region may run again.

        Nearly all reads are the first, and all but a few of those are of this kind: it goes past what the others have
        to heed. ``None`` where this one is another, or `site` computes several tensors.
        """
        if site in self.values or site.record.cache == "never" or len(site.record.members) > 1:
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

    def _evaluate(self, site: ParametrizedTensor, evaluate: Callable[[], Any]) -> Any:
        if hooks_are_on() or (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) != (
            self.grad,
            self.inference,
        ):
            return self._evaluate_apart(site, evaluate)
        return evaluate()

    def _evaluate_apart(self, site: ParametrizedTensor, evaluate: Callable[[], Any]) -> Any:
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

    def transpose(self, site: ParametrizedTensor) -> None:
        """Keep the transpose of what has been read time and again, if it is one that later reads can use."""
        value = self.known.get(site, self.passing.get(site))
        if type(value) is not Tensor or value.dim() != 2 or is_compiling() or _interpreter() is not None:
            return
        if (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (self.grad, self.inference):
            self.transposed[site] = value.t()

    def forget(self, site: ParametrizedTensor) -> None:
        """Evaluate anew when `site` is asked for again."""
        for held in (self.values, self.known, self.passing, self.transposed, self.versions):
            held.pop(site, None)
        self.lists.clear()
        self.uses.clear()

    def check_writes(self) -> None:
        """Refuse what the forward wrote into buffers that are computed, and warn of what it wrote into weights."""
        for site, version in self.versions.items():
            value = self.values[site]
            if (value._version if type(value) is Tensor else _version(value)) == version:
                continue
            record = site.record
            if site.stands_for_buffer:
                raise RewriterError(
                    f"the forward changed {record.name} in place; it is computed by {' >> '.join(record.chain)} and "
                    "cannot keep the change: assign to it instead, or leave it out of the spec"
                )
            if not site.renormed:
                warn_of_write(record.name, record.chain, "lasts for this forward only")

    def again(self, region: Region) -> Frame:
        """Return the frame for running a checkpointed region of this forward again.

        The region gets the same values. Those that drew random numbers in it draw them once more, as it were, since
        everything the region draws after them has to come out as it did.
        """
        return _Again(self, region) if any(drawn.region is region for drawn in self.drawn.values()) else self


class _Second(Frame):
    """A frame of what runs again, in which no read is a first one."""

    def first_value(self, site: ParametrizedTensor) -> None:
        return None


@dataclass(frozen=True)
class Drawn:
    """An evaluation that drew random numbers in a checkpointed region.

    Arguments:
        region: the region.
        devices: whose generators `before` and `after` tell of, beside the CPU's.
        before: states of the generators.
        after: the same, once the value was there.
    """

    region: Region
    devices: Sequence[int]
    before: Sequence[Tensor]
    after: Sequence[Tensor]

    def skip(self) -> None:
        """Go past what was drawn, if the generators are where they were; a region may not mean to draw the same."""
        if same_states(self.before, random_states(self.devices)):
            set_random_states(self.devices, self.after)


class _Again(_Second):
    def __init__(self, frame: Frame, region: Region) -> None:
        drawn = {site: drawn for site, drawn in frame.drawn.items() if drawn.region is region}
        super().__init__({site: value for site, value in frame.values.items() if site not in drawn})
        self.frame = frame
        self.skipped = drawn

    def _evaluate(self, site: ParametrizedTensor, evaluate: Callable[[], Any]) -> Any:
        if site not in self.skipped or site not in self.frame.values:
            return super()._evaluate(site, evaluate)
        self.skipped[site].skip()
        return self.frame.values[site]


class _Repeated(_Second):
    """The frame of what a backward runs again without saying which forward it belonged to."""

    def _evaluate(self, site: ParametrizedTensor, evaluate: Callable[[], Any]) -> Any:
        value = super()._evaluate(site, evaluate)
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                # A reentrant region differentiates what it ran at once: the next one needs a graph of its own.
                tensor.register_hook(lambda gradient: self.forget(site))  # type: ignore[no-untyped-call]
        return value


class _Running(threading.local):
    def __init__(self) -> None:
        # Set from the start: torch.compile would notice that the attribute came to be, and compile again.
        self.frame: Frame | None = None
        self.valid: dict[Any, Any] = {}
        """Site → its cached value, found valid when the running forward of a graph started."""


@loadable()
class Session:
    """The forwards now running in one model, one stack for each thread.

    A copied or unpickled model gets a session of its own, with nothing running in it.
    """

    def __init__(self) -> None:
        self.running = _Running()
        self.graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        """The models of this session that run a graph."""
        self._repeated: dict[tuple[int, bool], Frame] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return Session()

    def __copy__(self) -> Session:
        return Session()

    def __reduce__(self) -> tuple[type[Session], tuple[()]]:
        return (Session, ())

    @property
    def frame(self) -> Frame | None:
        """The innermost running forward of this thread; in a backward, the one of which a region runs again."""
        frame = self.running.frame
        if is_compiling():
            return frame
        if frame is None:
            task = graph_task()
            return None if task is None else self._frame_again(task)
        region = region_of_forward()
        if region is not None:
            region.frames[self] = frame
        return frame

    def begin(self, frame: Frame) -> Extent:
        """Return a context in which `frame` is the running forward."""
        if not is_compiling():
            region = region_of_forward()
            if region is not None:
                region.frames[self] = frame
        return Extent(self.running, frame)

    def _frame_again(self, task: int) -> Frame:
        region = region_of_backward()
        if region is not None and self in region.frames:
            if (self, task) not in region.repeated:
                region.repeated[self, task] = region.frames[self].again(region)
            former: Frame = region.repeated[self, task]
            return former
        key = (task, torch.is_grad_enabled())
        if key not in self._repeated:
            self._repeated[key] = _Repeated()
            forget: Callable[[], Any] = lambda: self._repeated.pop(key, None)  # noqa: E731
            torch.autograd.Variable._execution_engine.queue_callback(forget)
        return self._repeated[key]


class Extent:
    """A `with` block that makes a frame the running one, and puts the former back."""

    def __init__(self, running: _Running, frame: Frame) -> None:
        self.running = running
        self.entered = frame
        self.former: Frame | None = None

    def __enter__(self) -> Frame:
        self.former = self.running.frame
        self.running.frame = self.entered
        return self.entered

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.running.frame = self.former


def _version(value: Any) -> int:
    parts = value if isinstance(value, tuple) else (value,)
    return sum(part._version for part in parts if isinstance(part, Tensor) and not part.is_inference())
