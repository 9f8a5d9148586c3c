"""What the steps of a chain make of the stored tensors: plain tensor code, which torch.fx can record step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rewriter.sites._gathered import gathered, scattered
from rewriter.sites._spec import SiteSpec


def apply_chain(
    record: SiteSpec,
    steps: Sequence[Callable[..., Any]],
    originals: Sequence[Tensor],
    inputs: Sequence[Tensor],
    done: int = 0,
    value: Any = None,
) -> Any:
    """Return the value of a site: a tensor, or a tuple of them where it computes several.

    Arguments:
        record: says which step reads what.
        steps: the parametrizations, or what stands for them.
        originals: the stored tensors.
        inputs: the tensors named in ``record.reads``.
        done: how many steps have run already, all without `inputs`.
        value: what they gave.
    """
    if record.simple and not done:
        first, *others = steps
        value = first(*originals)
        for step in others:
            value = step(value)
        return value
    value = apply_steps(record, steps, originals, inputs, done, value)
    sources = (*originals, *inputs) if record.gather else ()
    if len(record.members) > 1:
        return tuple(scattered(value[index], sources) for index in range(len(record.members)))
    layout = record.layout
    if not layout.plain:
        rest = originals[-1] if layout.only else None
        value = layout.outward(value, gathered(rest) if record.gather else rest)
    return scattered(value, sources)


def apply_steps(
    record: SiteSpec,
    steps: Sequence[Callable[..., Any]],
    originals: Sequence[Tensor],
    inputs: Sequence[Tensor],
    done: int = 0,
    value: Any = None,
) -> Any:
    """Return what the last of `steps` gives, in the chain's own view of the tensor; arguments as `apply_chain`."""
    layout = record.layout
    if record.gather:
        originals, inputs = list(map(gathered, originals)), list(map(gathered, inputs))
    stored = list(originals)
    if record.outer:
        stored[0] = layout.part.inward(stored[0])
    further = iter(inputs)
    if record.source is not None:
        value = layout.inward(next(further))
    for index, step in enumerate(steps):
        arguments, stored = stored[: record.stored[index]], stored[record.stored[index] :]
        if index < done:
            continue
        if value is not None:
            arguments.insert(record.carries[index], value)
        arguments += [next(further) for _ in record.inputs[index]]
        value = step(*arguments)
    return value
