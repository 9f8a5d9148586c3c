"""Recurrent layers of torch: one call of them is one use of their weights, of which they keep a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from rewriter.runtime._checkpoint import saving_hooks
from rewriter.runtime._scope import Session
from rewriter.runtime._tensor import ParametrizedTensor

Sites = Callable[[Any], Mapping[str, ParametrizedTensor]]


def one_list_a_call(forward: Callable[..., Any], session_slot: str) -> Callable[..., Any]:
    """Return the forward of an RNNBase, which asks for its list of weights more than once, as one use of them.

    Arguments:
        forward: the layer's own.
        session_slot: where an owner keeps its session.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = None if is_compiling() else self.__dict__[session_slot].running.frame
        if frame is None:
            return forward(self, *args, **kwargs)
        frame.uses[self] = None
        try:
            return forward(self, *args, **kwargs)
        finally:
            frame.uses.pop(self, None)

    return call


def list_of_weights(session_slot: str, sites_of: Sites) -> dict[str, Any]:
    """Return what a class of owners has for the list of its weights, which RNNBase would keep up to date itself.

    Arguments:
        session_slot: where an owner keeps its session.
        sites_of: an owner → its sites.
    """

    def read(self: Any) -> list[Tensor | None]:
        session: Session | None = self.__dict__.get(session_slot)
        frame = None if session is None or is_compiling() or saving_hooks(True) else session.running.frame
        if frame is None:
            return [getattr(self, name, None) for name in self._flat_weights_names]
        weights = frame.lists.get(self) or frame.uses.get(self)
        if weights is None:
            weights = [getattr(self, name, None) for name in self._flat_weights_names]
            # What is assigned to a tensor is written to the list, for the rest of the forward or of the call.
            if all(site.record.cache != "never" for site in sites_of(self).values()):
                frame.lists[self] = weights
            elif self in frame.uses:
                frame.uses[self] = weights
        return weights

    return {"_flat_weights": property(read, _ignore), "_update_flat_weights": _nothing_to_update}


def _ignore(self: Any, weights: list[Tensor | None]) -> None:
    """RNNBase keeps this list up to date by itself; an owner computes it."""


def _nothing_to_update(self: Any) -> None:
    """RNNBase makes its list anew whenever a weight is another tensor than before, which computed ones always are."""
