"""Right inverses: of one step, and of a whole chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rewriter.parametrizations._chain import right_inverse as right_inverse


class Inverse(NamedTuple):
    """What a chain maps to a value, and how its steps share it.

    Arguments:
        originals: the stored tensors, in the order in which the steps read them.
        stored: for each step, how many of them it reads.
        carries: for each step, which of its arguments is the previous step's result.
    """

    originals: list[Tensor]
    stored: tuple[int, ...]
    carries: tuple[int, ...]


def invert_chain(
    steps: Sequence[nn.Module],
    value: Any,
    inputs: Sequence[Sequence[Tensor]],
    *,
    from_source: bool,
    inverse_of: Callable[[int, Any], Any] | None = None,
) -> Inverse:
    """Run the right inverses, last step first.

    Arguments:
        steps: the chain, left to right.
        value: what it is to give, as the chain sees it.
        inputs: for each step, the further tensors that it reads.
        from_source: whether the first step starts from another tensor of the model, which is not stored.
        inverse_of: instead of the steps' own right inverses; takes the step's index and the value.
    """
    stored: list[list[Tensor]] = []
    carries: list[int] = []
    for index in reversed(range(len(steps))):
        step = steps[index]
        found = right_inverse(step, value, inputs[index]) if inverse_of is None else inverse_of(index, value)
        parts = parts_of(found)
        if index == 0 and not from_source:
            carries.append(0)
        else:
            carries.append(carry_of(step, parts, value.shape if isinstance(value, Tensor) else None))
            value = parts.pop(carries[-1])
        stored.append(parts)
    stored.reverse()
    originals = [part for parts in stored for part in parts]
    return Inverse(originals, tuple(len(parts) for parts in stored), tuple(reversed(carries)))


def parts_of(found: Any) -> list[Tensor]:
    """Return the tensors of a right inverse, which may give one or several."""
    return list(found) if isinstance(found, (tuple, list)) else [found]


def carry_of(step: nn.Module, parts: Sequence[Tensor], shape: torch.Size | None) -> int:
    """Return which of a step's inputs the step before it produces: as declared, else the one of the value's shape."""
    declared = getattr(step, "chain_input", None)
    if declared is not None:
        return min(int(declared), len(parts) - 1)
    return next((index for index, part in enumerate(parts) if part.shape == shape), 0)
