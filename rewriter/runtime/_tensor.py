"""One site as a module: the stored tensors, the chain, and the one evaluation that a forward makes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.runtime._record import Member, Record
from rewriter.runtime._scope import Session


class ParametrizedTensor(nn.Module):
    """A tensor that is computed from stored ones by a chain of parametrizations.

    It lives at ``owner.parametrizations.<tensor>``, where torch puts its own, and its state-dict keys are torch's:
    ``original`` (or ``original0``, ``original1``, …) and ``0.*``, ``1.*``, … for the steps. Called, it evaluates
    the chain: in a graph it is the caching node.

    Arguments:
        steps: the parametrizations, applied left to right.
        originals: the tensors they start from.
        record: what the site computes and replaced.
    """

    def __init__(self, steps: Sequence[nn.Module], originals: Sequence[Tensor], record: Record) -> None:
        super().__init__()
        self.record = record
        self.session = Session()
        self._places: tuple[tuple[Any, str], ...] = ()
        single = record.source is None and sum(record.stored) == 1 and len(originals) == 1
        names = ["original"] if single else [f"original{index}" for index in range(len(originals))]
        self.original_names = tuple(names)
        for name, original in zip(names, originals, strict=True):
            if isinstance(original, nn.Parameter):
                self.register_parameter(name, original)
            else:
                self.register_buffer(name, original, persistent=record.members[0].persistent)
        for index, step in enumerate(steps):
            self.add_module(str(index), step)

    @property
    def steps(self) -> list[nn.Module]:
        """The parametrizations in the order in which they are applied."""
        return [getattr(self, str(index)) for index in range(len(self.record.chain))]

    @property
    def originals(self) -> list[Tensor]:
        """The stored tensors, in the order in which the steps read them."""
        return [getattr(self, name) for name in self.original_names]

    def forward(self, *inputs: Tensor) -> Any:
        """Return the value: a tensor, or a tuple of them for a joint site.

        Arguments:
            inputs: the model's tensors named in ``record.reads``, in that order.
        """
        if self.training and _in_backward():
            # A checkpointed region runs again: the state has advanced for this forward already.
            return self.settled().evaluate(*inputs)
        return self.evaluate(*inputs)

    def evaluate(self, *inputs: Tensor) -> Any:
        """Run the chain once, whatever the cache policy.

        Under autocast the chain runs in the precision of its tensors, like the plain weight it stands for; the use
        of the value is what autocast casts.
        """
        device = self._device_type()
        if device is not None and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.compose(*inputs)
        return self.compose(*inputs)

    def compose(self, *inputs: Tensor) -> Any:
        """Apply the steps to the stored tensors, in the precision that is on."""
        return apply_chain(self.record, self.steps, self.originals, inputs)

    def settled(self) -> ParametrizedTensor:
        """Return this site in evaluation mode with buffers of its own, so that evaluating it changes nothing here."""
        clone: ParametrizedTensor = _settled(self)
        return clone

    def read(self, *inputs: Tensor) -> Any:
        """Return the value without advancing any state, random numbers included."""
        with torch.random.fork_rng(devices=[]):
            return self.settled().evaluate(*inputs)

    def _device_type(self) -> str | None:
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((tensor.device.type for tensor in tensors), None)

    # How a module that torch.fx cannot trace reads the value: an attribute access finds the running forward.

    def place_inputs(self, places: Sequence[tuple[nn.Module, str]]) -> None:
        """Remember where the tensors named in ``record.reads`` live: pairs of owner and attribute name."""
        self._places = tuple((_Reference(owner), name) for owner, name in places)

    def read_inputs(self) -> list[Tensor]:
        """Return the tensors named in ``record.reads`` as they are now."""
        return [getattr(reference.module, name) for reference, name in self._places]

    def current(self) -> Any:
        """Return the value for the running forward; without one, the value as it stands."""
        frame = self.session.frame
        if frame is None:
            return self.read(*self.read_inputs())
        if self.record.cache == "never":
            return self(*self.read_inputs())
        return frame.value(self, lambda: self(*self.read_inputs()))

    def member(self, tensor: str) -> Member:
        """Return what is known of one of the tensors computed, by its name at the owner."""
        return self.record.members[self.position(tensor)]

    def position(self, tensor: str) -> int:
        """Return which of the tensors computed has this name at the owner; a tied one has several."""
        if len(self.record.members) == 1:
            return 0
        return [member.tensor for member in self.record.members].index(tensor)

    def current_member(self, tensor: str) -> Any:
        """Return `current` for one of the tensors computed, by its name at the owner."""
        value = self.current()
        return value if len(self.record.members) == 1 else value[self.position(tensor)]

    def extra_repr(self) -> str:
        return f"{self.record.name} = {' >> '.join(self.record.chain)}, cache={self.record.cache}"


def apply_chain(
    record: Record, steps: Sequence[Callable[..., Any]], originals: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Any:
    """Return what `steps` make of the stored tensors: plain tensor code, which torch.fx can record step by step.

    Arguments:
        record: says which step reads what.
        steps: the parametrizations, or what stands for them.
        originals: the stored tensors.
        inputs: the tensors named in ``record.reads``.
    """
    layout = record.layout
    stored = list(originals)
    if record.outer:
        stored[0] = layout.inward(stored[0])
    further = iter(inputs)
    value: Any = None
    if record.source is not None:
        value = layout.inward(next(further))
    for index, step in enumerate(steps):
        arguments, stored = stored[: record.stored[index]], stored[record.stored[index] :]
        if value is not None:
            arguments.insert(record.carries[index], value)
        arguments += [next(further) for _ in record.inputs[index]]
        value = step(*arguments)
    if len(record.members) > 1:
        return tuple(value[index] for index in range(len(record.members)))
    return value if layout.plain else layout.outward(value)


class _Reference:
    """A module that is not a submodule: kept out of state dicts and of the module tree, copied with the model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def _settled(module: Any) -> Any:
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update(module.__dict__)
    clone.__dict__["training"] = False
    clone.__dict__["_parameters"] = dict(module._parameters)
    clone.__dict__["_buffers"] = {
        name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
    }
    clone.__dict__["_modules"] = {
        name: None if child is None else _settled(child) for name, child in module._modules.items()
    }
    return clone


def _in_backward() -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1
