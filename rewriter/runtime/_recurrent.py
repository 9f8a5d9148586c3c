"""Recurrent layers of torch: one call of them is one use of their weights, of which they keep a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
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


def lstm_call(forward: Callable[..., Any], session_slot: str) -> Callable[..., Any]:
    """Return the forward of an LSTM that makes the usual call itself: a batch of sequences that start from zeros.

    torch makes the zeros twice, and looks at everything that they and the weights might be.

    Arguments:
        forward: for all other calls.
        session_slot: where an owner keeps its session.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if type(x) is not Tensor or x.dim() != 3 or x.size(2) != self.input_size or self.proj_size:
            return forward(self, *args, **kwargs)
        if is_compiling() or self.__dict__[session_slot].running.frame is None:
            return forward(self, *args, **kwargs)
        weights = self._flat_weights
        if weights[0].dtype is not x.dtype and not torch._C._is_any_autocast_enabled():
            return forward(self, x)  # which says what is wrong
        rows, batch = self.num_layers * (2 if self.bidirectional else 1), x.size(0 if self.batch_first else 1)
        zeros = torch.zeros(rows, batch, self.hidden_size, dtype=x.dtype, device=x.device)
        flags = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
        output, h, c = torch.lstm(x, (zeros, zeros), weights, *flags)
        return output, (h, c)

    return call


def list_of_weights(session_slot: str, container: str) -> dict[str, Any]:
    """Return what a class of owners has for the list of its weights, which RNNBase would keep up to date itself.

    Arguments:
        session_slot: where an owner keeps its session.
        container: the submodule that holds an owner's sites.
    """

    def read(self: Any) -> list[Tensor | None]:
        session: Session | None = self.__dict__.get(session_slot)
        frame = None if session is None or is_compiling() or saving_hooks(True) else session.running.frame
        if frame is None:
            return [getattr(self, name, None) for name in self._flat_weights_names]
        weights = frame.lists.get(self) or frame.uses.get(self)
        if weights is None:
            stored = self._parameters
            weights = [
                getattr(self, name, None) if stored.get(name) is None else stored[name]
                for name in self._flat_weights_names
            ]
            # What is assigned to a tensor is written to the list, for the rest of the forward or of the call.
            if frame.values.keys() >= set(self._modules[container]._modules.values()):  # none has the policy never
                frame.lists[self] = weights
            elif self in frame.uses:
                frame.uses[self] = weights
        return weights

    return {"_flat_weights": property(read, _ignore), "_update_flat_weights": _nothing_to_update}


def _ignore(self: Any, weights: list[Tensor | None]) -> None:
    """RNNBase keeps this list up to date by itself; an owner computes it."""


def _nothing_to_update(self: Any) -> None:
    """RNNBase makes its list anew whenever a weight is another tensor than before, which computed ones always are."""
