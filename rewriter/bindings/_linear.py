"""Linear layers that a forward calls time and again: their weight is transposed once, not at every call.

`torch.nn.functional.linear` makes the transpose of the weight at each call, with a node of the autograd graph each
time. In an RNN unrolled over a hundred time steps this is a twentieth of the time, and so is
the sum of what the input and what the state contribute, which the product can do on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional

from rewriter._torch import saved_tensor_hooks
from rewriter.context._forward import Contexts
from rewriter.sites._apart import may_be_apart, parts_of
from rewriter.sites._container import refuse_override
from rewriter.sites._places import CONTAINER, CONTEXTS


def _times_transposed(x: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() == 2:
        return torch.mm(x, transposed) if bias is None else torch.addmm(bias, x, transposed)
    return functional.linear(x, transposed.t(), bias)


def linear_forward(forward: Callable[..., Any], bias_is_stored: bool) -> Callable[..., Any]:
    """Return the forward of owners of a computed weight that have the forward of nn.Linear.

    Arguments:
        forward: that of owners in general.
        bias_is_stored: rather than computed.
    """

    def linear(self: Any, *args: Any, **kwargs: Any) -> Any:
        contexts: Contexts | None = self.__dict__.get(CONTEXTS)
        context = None if contexts is None else contexts.running.context
        if context is None or kwargs or len(args) != 1 or is_compiling() or saved_tensor_hooks(True) is not None:
            return forward(self, *args, **kwargs)
        site = self._modules[CONTAINER]._modules.get("weight")
        slots = self._parameters
        if slots.get("weight") is not None:
            refuse_override("weight")
        # A replica's parameters are attributes. Everybody else's are found without nn.Module.__getattr__.
        bias = slots["bias"] if bias_is_stored and "bias" in slots else self.bias
        transposed = context.transposed.get(site)
        if transposed is not None:
            return _times_transposed(args[0], transposed, bias)
        if may_be_apart(site):
            parts = parts_of(site)
            if parts is not None:
                base, step = parts
                return step.linear(*args, base, bias)
        weight = context.first_value(site)
        if weight is None:
            again = site in context.values
            weight = self.weight
            if again:
                context.transpose(site)  # for the next time
        return functional.linear(*args, weight, bias)

    return linear
