"""Recurrent layers of torch: one call of them is one use of their weights, of which they keep a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from rewriter._torch import saved_tensor_hooks
from rewriter.context._forward import Contexts, ForwardContext
from rewriter.sites._places import CONTAINER, CONTEXTS


def one_list_a_call(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of an RNNBase, which asks for its list of weights more than once, as one use of them."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = None if is_compiling() else self.__dict__[CONTEXTS].running.context
        if context is None:
            return forward(self, *args, **kwargs)
        context.uses[self] = None
        try:
            return forward(self, *args, **kwargs)
        finally:
            context.uses.pop(self, None)

    return call


def _read(self: Any) -> list[Tensor | None]:
    contexts: Contexts | None = self.__dict__.get(CONTEXTS)
    context = None if contexts is None or is_compiling() or saved_tensor_hooks(True) else contexts.running.context
    if context is None:
        return [getattr(self, name, None) for name in self._flat_weights_names]
    return _weights(self, context)


def _weights(owner: Any, context: ForwardContext) -> list[Tensor | None]:
    """Return the weights of `owner` for the rest of the forward, or of the call."""
    weights = context.lists.get(owner) or context.uses.get(owner)
    if weights is None:
        stored = owner._parameters
        names = owner._flat_weights_names
        weights = [getattr(owner, name, None) if stored.get(name) is None else stored[name] for name in names]
        # What is assigned to a tensor is written to the list.
        if context.values.keys() >= set(owner._modules[CONTAINER]._modules.values()):  # none has the policy never
            context.lists[owner] = weights
        elif owner in context.uses:
            context.uses[owner] = weights
    return weights


def _ignore(self: Any, weights: list[Tensor | None]) -> None:
    """RNNBase keeps this list up to date by itself; an owner computes it."""


def _nothing_to_update(self: Any) -> None:
    """Do nothing: RNNBase makes its list again for each new tensor, and a computed weight always is one."""


LIST_OF_WEIGHTS = {"_flat_weights": property(_read, _ignore), "_update_flat_weights": _nothing_to_update}
"""What a class of owners has for the list of its weights, which RNNBase would keep up to date itself."""
