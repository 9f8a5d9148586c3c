"""Chains in Python: ``first >> second``, or ``chain(first, second)``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn


class Chain(nn.Module):
    """Parametrizations applied left to right, as one parametrization.

    >>> import torch, rewriter
    >>> double = rewriter.chain(torch.nn.Identity(), torch.nn.Softplus())
    >>> [type(step).__name__ for step in double]
    ['Identity', 'Softplus']

    It serves wherever a parametrization does: as the ``chain`` of a rule given from Python, where its steps become the
    rule's own, and in `torch.nn.utils.parametrize.register_parametrization`.

    Arguments:
        steps: the parametrizations; chains among them are unfolded.
    """

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        flat = [inner for step in steps for inner in (step if isinstance(step, Chain) else [step])]
        for index, step in enumerate(flat):
            if not isinstance(step, nn.Module):
                raise TypeError(f"a chain is made of modules, not of {type(step).__name__}")
            self.add_module(str(index), step)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._modules)

    def __rshift__(self, following: nn.Module) -> Chain:
        return Chain(self, following)

    def __rrshift__(self, former: nn.Module) -> Chain:
        return Chain(former, self)

    def forward(self, *inputs: Tensor) -> Any:
        """Return what the steps make of the inputs; the first step may take several."""
        value: Any = inputs
        for index, step in enumerate(self):
            value = step(*value) if index == 0 else step(value)
        return value

    def right_inverse(self, value: Tensor) -> Any:
        """Return what the chain maps to `value`: the steps' right inverses, last step first."""
        found: Any = value
        for step in reversed(list(self)):
            found = right_inverse(step, found)
        return found


def chain(*steps: nn.Module) -> Chain:
    """Return the parametrization that applies `steps` left to right: ``chain(a, b)`` is ``b(a(x))``.

    >>> import torch, rewriter
    >>> both = rewriter.chain(torch.nn.Tanh(), torch.nn.Softplus())
    >>> x = torch.zeros(2)
    >>> bool((both(x) == torch.nn.functional.softplus(torch.tanh(x))).all())
    True
    """
    return Chain(*steps)


def compose(self: nn.Module, following: nn.Module) -> Chain:
    """``self >> following``: what `register` gives a class that has no ``>>`` of its own."""
    return Chain(self, following)


def right_inverse(step: nn.Module, value: Any, inputs: Sequence[Tensor] = ()) -> Any:
    """Return the input that `step` maps to `value`; `value` itself if the step has no right inverse.

    A right inverse that raises NotImplementedError, as some of torch do, counts as none.
    """
    inverse = getattr(step, "right_inverse", None)
    if inverse is None:
        return value
    try:
        return inverse(value, *inputs) if inputs else inverse(value)
    except NotImplementedError:
        return value
