"""One site as a module: the stored tensors, the chain, and the one evaluation that a forward makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.traceback import annotate, preserve_node_meta

from rewriter._torch import current_backward
from rewriter.context._checkpoint import may_run_again
from rewriter.context._forward import Contexts
from rewriter.context._fused import Group, evaluated_steps
from rewriter.context._policy import Policy
from rewriter.context._random import devices_of, nothing_drawn, random_states, same_states
from rewriter.context._recompute import recomputed
from rewriter.context._replay import evaluated_again, note_state, settled_copy, varies
from rewriter.context._tracers import as_autocast, autocast_anywhere, ordinary, others_trace
from rewriter.errors import CaptureError, PlanError
from rewriter.sites._apart import parts_of
from rewriter.sites._identity import difference, note_identity
from rewriter.sites._places import CONTAINER
from rewriter.sites._reference import Reference
from rewriter.sites._refit import refit
from rewriter.sites._spec import Member, SiteSpec
from rewriter.sites._steps import apply_chain, apply_steps


class Site(nn.Module):
    """A tensor that is computed from stored ones by a chain of parametrizations.

    It lives at ``owner.parametrizations.<tensor>``, where torch puts its own, and its state-dict keys are torch's:
    ``original`` (or ``original0``, ``original1``, …) and ``0.*``, ``1.*``, … for the steps. Called, it evaluates
    the chain: in a graph it is the caching node.

    Arguments:
        steps: the parametrizations, applied left to right.
        originals: the tensors they start from.
        spec: what the site computes and replaced.
        contexts: of the model; one of its own where it is in none yet.
    """

    spec: SiteSpec
    contexts: Contexts
    original_names: tuple[str, ...]
    owned = False
    """Whether it has an owner."""
    policy: Policy
    trained_before: dict[str, bool] | None
    """While the site is frozen: which of its parameters were trained before."""
    renormed = False
    """Whether it is an embedding with `max_norm`, which writes to its weight in every forward."""
    hoisted: int
    """How many of the first steps depend on nothing that is trained; their result is cached."""
    fused: tuple[Group, ...] = ()
    """Which neighbouring steps are evaluated as one."""
    _places: tuple[tuple[Any, str], ...]

    def __init__(
        self,
        steps: Sequence[nn.Module],
        originals: Sequence[Tensor],
        spec: SiteSpec,
        contexts: Contexts | None = None,
    ) -> None:
        super().__init__()
        names = spec.original_names(len(originals))
        # Module.__setattr__ looks for parameters in every value, which takes time for thousands of sites.
        contexts = Contexts() if contexts is None else contexts
        self.__dict__.update(spec=spec, contexts=contexts, original_names=names, _places=())
        self.__dict__.update(policy=Policy(spec.cache == "version"), trained_before=None, hoisted=0)
        for name, original in zip(names, originals, strict=True):
            if isinstance(original, nn.Parameter):
                self._parameters[name] = original
            else:
                self.register_buffer(name, original, persistent=spec.members[0].persistent)
        for index, step in enumerate(steps):
            self._modules[str(index)] = step

    @property
    def steps(self) -> list[nn.Module]:
        """The parametrizations in the order in which they are applied."""
        # torch puts its own container here if it parametrizes an original.
        return [module for name, module in self._modules.items() if module is not None and name != CONTAINER]

    @property
    def originals(self) -> list[Tensor]:
        """The stored tensors, in the order in which the steps read them."""
        stored, names = self._parameters, self.original_names
        if len(names) == 1 and "original" in stored:  # as nearly always
            return [stored["original"]]  # type: ignore[list-item]
        # Buffers are elsewhere, and so are the parameters of a replica.
        return [stored[name] if name in stored else getattr(self, name) for name in names]  # type: ignore[misc]

    def forward(
        self, *inputs: Tensor, cast: bool = False, batch: Any = None, slot: int = 0, apart: bool = False
    ) -> Any:
        """Return the value: a tensor, or a tuple of them for a joint site.

        Arguments:
            inputs: the model's tensors named in ``spec.reads``, in that order.
            cast: give the value in autocast's precision where autocast is on: all its uses would cast it.
            batch: values that were evaluated together with those of other sites, if they were.
            slot: which of them is this site's.
            apart: the use is a linear layer that takes the base and the step in the place of the value.

        Raises:
            CaptureError: a tracer that knows nothing of sites would record the value as a constant.
        """
        if apart:
            parts = parts_of(self)
            if parts is not None:
                return parts
        if self.policy.versioned and not torch.compiler.is_compiling():
            valid = self.contexts.running.valid
            if self in valid:
                return valid[self]
        if batch is None and ordinary():
            if self.policy.busy:
                kept = self.policy.valid_value(inputs)
                if kept is not None:
                    return kept
            elif self.spec.simple and self.spec.memory == "keep" and not self.hoisted and not self.fused:
                stored, names = self._parameters, self.original_names
                noted = self.training and may_run_again()
                if len(stored) == len(names) and not noted:  # none of them is a buffer, and this is no replica
                    return self._run(map(stored.__getitem__, names))
        value = self._value(inputs) if batch is None else batch[slot]
        return as_autocast(value) if cast and autocast_anywhere() else value

    def _value(self, inputs: Sequence[Tensor]) -> Any:
        if others_trace():
            raise CaptureError(
                f"torch.fx would record the value of {self.spec.name} as a constant, which nothing trains: rewrite "
                "with capture='graph', whose graph other tracers can take over, or trace the plain model, before it is "
                "rewritten or after bake()"
            )
        if not torch.compiler.is_exporting():
            return self.policy.value(self, inputs) if self.policy.busy else self.advance(*inputs)
        with preserve_node_meta(), annotate({"reparam": self.spec.noted()}):
            return self.advance(*inputs)

    def _run(self, originals: Iterable[Any]) -> Any:
        """Run a chain in which every step reads what the one before it gave: most chains, in most forwards."""
        steps = iter(self._modules.values())
        try:
            value = next(steps)(*originals)  # type: ignore[misc]
            for step in steps:
                value = step(value)  # type: ignore[misc]
        except Exception as problem:
            self._note(problem)
            raise
        return value

    def advance(self, *inputs: Tensor) -> Any:
        """Evaluate for a new forward: a state advances, unless it did so for this forward already."""
        if self.training and not torch.compiler.is_compiling() and current_backward() != -1:
            # A checkpointed region runs again.
            return evaluated_again(self, inputs)
        if self.training and not torch.compiler.is_compiling() and may_run_again():
            note_state(self)
        return self.evaluate(*inputs)

    def evaluate(self, *inputs: Tensor) -> Any:
        """Run the chain once, whatever the cache policy.

        Under autocast the chain runs in the precision of its tensors, like the plain weight it stands for; the use
        of the value is what autocast casts.
        """
        keep = self.spec.memory == "keep"
        run: Callable[..., Any] = self.compose if keep else lambda *given: recomputed(self, given)
        try:
            if autocast_anywhere():
                device = self._device_type()
                if device is not None and torch.is_autocast_enabled(device):
                    with torch.autocast(device, enabled=False):
                        return run(*inputs)
            return run(*inputs)
        except Exception as problem:
            self._note(problem)
            raise

    def _note(self, problem: Exception) -> None:
        """Let the problem say which tensor was being computed."""
        problem.add_note(f"while computing {self.spec.name}: {' >> '.join(self.spec.chain)}")

    def compose(self, *inputs: Tensor) -> Any:
        """Apply the steps to the stored tensors, in the precision that is on."""
        steps = evaluated_steps(self) if self.fused else self.steps
        if self.hoisted and not torch.compiler.is_compiling():
            return apply_chain(self.spec, steps, self.originals, inputs, self.hoisted, self.hoisted_value())
        return apply_chain(self.spec, steps, self.originals, inputs)

    def hoisted_value(self) -> Any:
        """Return the result of the hoisted steps, cached if nothing that it depends on has changed."""
        count = self.hoisted

        def first() -> Any:
            steps = evaluated_steps(self) if self.fused else self.steps
            return apply_steps(self.spec, steps[:count], self.originals[: sum(self.spec.stored[:count])], ())

        return self.policy.cache("hoisted", self, count, (), first)

    def settled(self, trains: Callable[[str], bool] = lambda path: False) -> Site:
        """Return this site in evaluation mode with buffers of its own, so that evaluating it changes nothing here.

        Arguments:
            trains: path of a module in it → whether it keeps its mode instead.
        """
        clone: Site = settled_copy(self, trains)
        clone.policy = Policy()
        return clone

    def read(self, *inputs: Tensor) -> Any:
        """Return the value without advancing any state, random numbers included."""
        return self.read_and_drawn(*inputs)[0]

    def read_and_drawn(self, *inputs: Tensor) -> tuple[Any, bool]:
        """Return what `read` does, and whether the chain drew random numbers in evaluation mode."""
        self.policy.check_outside()
        if self.policy.frozen:
            return self.policy.frozen_value(self, inputs), False
        tensors = [*self.originals, *inputs]
        with nothing_drawn(tensors):
            before = random_states(devices_of(tensors))
            value = self.settled().evaluate(*inputs)
            return value, not same_states(before, random_states(devices_of(tensors)))

    def _device_type(self) -> str | None:
        return next((tensor.device.type for tensor in (*self.originals, *self.parameters(), *self.buffers())), None)

    # Cached values belong to this object: copies start without, conversions and loading drop them.

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Site:
        self.policy.invalidate()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.policy.check_outside()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_identity(self.spec, destination, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        self.policy.invalidate()
        problem = difference(self.spec.name, self.spec, metadata)
        if problem:
            args[-1].append(problem)
            state_dict.clear()  # the part for this site: its steps do not load either
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        if any(prefix + name in state_dict for name in self.original_names):
            refit(self, {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)})

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.policy = Policy(self.policy.versioned, self.policy.frozen)
        return replica

    def __getstate__(self) -> dict[str, Any]:
        self.policy.check_outside()
        return {name: value for name, value in self.__dict__.items() if name != "policy"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.policy = Policy(self.spec.cache == "version", self.trained_before is not None)

    def __copy__(self) -> Site:
        clone: Site = self.__class__.__new__(self.__class__)
        clone.__setstate__(self.__getstate__())
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        clone: Site = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        # Of its own class: torch's subclass, for a parametrized original, has a state that cannot be read.
        clone.__setstate__(copy.deepcopy(Site.__getstate__(self), memo))
        return clone

    # How a module that torch.fx cannot trace reads the value: an attribute access finds the running forward.

    def place_inputs(self, places: Sequence[tuple[nn.Module, str]]) -> None:
        """Remember where the tensors named in ``spec.reads`` live: pairs of owner and attribute name."""
        self._places = tuple((Reference(owner), name) for owner, name in places)

    def read_inputs(self) -> list[Tensor]:
        """Return the tensors named in ``spec.reads`` as they are now."""
        return [getattr(reference.module, name) for reference, name in self._places]

    def reads_from(self) -> list[tuple[str, nn.Module]]:
        """Return the tensors named in ``spec.reads``, each with its owner."""
        return [(name, place.module) for name, (place, _) in zip(self.spec.reads, self._places, strict=True)]

    def current(self) -> Any:
        """Return the value for the running forward; without one, the value as it stands."""
        context = self.contexts.context
        if context is None:
            once = self.policy.once
            if once is not None and not self.policy.frozen and (self.repeatable or once.at[self]):  # no state advances
                return self.policy.value(self, self.read_inputs())
            inputs = self.read_inputs()
            return self.policy.read(self, self.read(*inputs), inputs)
        if self.spec.cache == "never":
            return self(*self.read_inputs())
        return context.value(self, lambda: self(*self.read_inputs()))

    @property
    def lasting(self) -> bool:
        """Whether its own tensors decide whether a cached value is valid: it reads nothing else, and is no buffer."""
        return not self._places and self.spec.members[0].kind != "buffer"

    @property
    def repeatable(self) -> bool:
        """Whether evaluating again gives the same value: no state advances and nothing is drawn at random."""
        return not self.training or not any(map(varies, self.steps))

    def member(self, tensor: str) -> Member:
        """Return what is known of one of the tensors computed, by its name at the owner."""
        return self.spec.members[self.position(tensor)]

    def position(self, tensor: str) -> int:
        """Return which of the tensors computed has this name at the owner; a tied one has several."""
        if len(self.spec.members) == 1:
            return 0
        return [member.tensor for member in self.spec.members].index(tensor)

    def current_member(self, tensor: str) -> Any:
        """Return `current` for one of the tensors computed, by its name at the owner."""
        value = self.current()
        return value if len(self.spec.members) == 1 else value[self.position(tensor)]

    def __iter__(self) -> Iterator[nn.Module]:  # for torch's transfer_parametrizations_and_params
        if not self.spec.simple:
            raise PlanError(f"{self.spec.name}: torch has no such chain; rewrite the other module with the same rule")
        return iter(self.steps)

    def __getattr__(self, name: str) -> Any:
        if name in ("append", "is_tensor"):  # which torch.nn.utils.parametrize asks of what computes a tensor
            raise AttributeError(
                f"{self.spec.name} is computed by reparam, not by torch.nn.utils.parametrize: add steps to its chain "
                "in the spec, and remove them with rewriter.bake"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"{self.spec.name} = {' >> '.join(self.spec.chain)}, cache={self.spec.cache}"
