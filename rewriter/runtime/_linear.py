"""Linear layers that a forward calls time and again: their weight is transposed once, not at every call.

`torch.nn.functional.linear` multiplies by the transpose of the weight, which it makes anew at each call, with a node
of the autograd graph each time. In an RNN unrolled over a hundred time steps this is a twentieth of the time, and so is
the sum of what the input and what the state contribute, which the product can do on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional

from rewriter.runtime._checkpoint import saving_hooks
from rewriter.runtime._places import CONTAINER, SESSION
from rewriter.runtime._scope import Session
from rewriter.runtime._sites import refuse_override
from rewriter.serialization._functions import graph_function


@graph_function
def times_transposed(x: Tensor, transposed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `torch.nn.functional.linear` does, by the same operations, of a weight that is transposed already.

    Arguments:
        x: of shape ``(..., in)``.
        transposed: of shape ``(in, out)``.
        bias: of shape ``(out,)``.
    """
    if x.dim() == 2:
        return torch.mm(x, transposed) if bias is None else torch.addmm(bias, x, transposed)
    return functional.linear(x, transposed.t(), bias)


@graph_function
def factors_of(x: Tensor, transposed: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `times_transposed` would multiply, for the sum that uses the product and nothing else does."""
    return x, transposed


@graph_function
def plus_product(summand: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """Return a sum with a product, by one operation where the summand has the shape and the type of the product.

    Arguments:
        summand: whatever can be added to the product.
        factors: of shapes ``(..., in)`` and ``(in, out)``, the second a weight that is transposed already.
    """
    x, transposed = factors
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return summand + times_transposed(x, transposed)
    else:
        if _is_like_product(summand, x, transposed):
            return torch.addmm(summand, x, transposed)
        return summand + times_transposed(x, transposed)


@graph_function
def product_plus(factors: tuple[Tensor, Tensor], summand: Tensor) -> Tensor:
    """Return what `plus_product` does: the sum as the model wrote it."""
    return plus_product(summand, factors)


def _is_like_product(summand: Tensor, x: Tensor, transposed: Tensor) -> bool:
    """Whether the sum is neither broadcast nor of another type than the product; autocast would make it one."""
    if x.dim() != 2 or summand.dtype is not x.dtype or summand.shape != (x.shape[0], transposed.shape[1]):
        return False
    return not is_compiling() and not torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def linear_forward(forward: Callable[..., Any], bias_is_stored: bool) -> Callable[..., Any]:
    """Return the forward of owners of a computed weight that have the forward of nn.Linear.

    Arguments:
        forward: that of owners in general.
        bias_is_stored: rather than computed.
    """

    def linear(self: Any, *args: Any, **kwargs: Any) -> Any:
        session: Session | None = self.__dict__.get(SESSION)
        frame = None if session is None else session.running.frame
        if frame is None or kwargs or len(args) != 1 or is_compiling() or saving_hooks(True) is not None:
            return forward(self, *args, **kwargs)
        site = self._modules[CONTAINER]._modules.get("weight")
        slots = self._parameters
        if slots.get("weight") is not None:
            refuse_override("weight")
        # A replica's parameters are attributes. Everybody else's are found without nn.Module.__getattr__.
        bias = slots["bias"] if bias_is_stored and "bias" in slots else self.bias
        transposed = frame.transposed.get(site)
        if transposed is not None:
            return times_transposed(*args, transposed, bias)
        weight = frame.first_value(site)
        if weight is None:
            again = site in frame.values
            weight = self.weight
            if again:
                frame.transpose(site)  # for the next time
        return functional.linear(*args, weight, bias)

    return linear
