"""Membership: whether a tensor is a value that a chain can have."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rewriter.context._random import nothing_drawn
from rewriter.errors import RewriterError
from rewriter.parametrizations._chain import Chain
from rewriter.testing._case import NotApplicable, Subject, default_tolerance, distance, instance, inverse, size_of


@torch.no_grad()
def on_space(
    step: Subject, tensor: Tensor, *, arguments: Mapping[str, Any] | None = None, tolerance: float | None = None
) -> bool:
    """Return whether a chain, or one step, can have this value: right inverse, then forward, gives it back.

    >>> import torch
    >>> on_space("symmetric", torch.tensor([[1.0, 2.0], [2.0, 5.0]]))
    True
    >>> on_space("symmetric", torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    False

    A value that the right inverse refuses is not in the space, and neither is one with NaN. A step that defines
    ``contains(tensor, tolerance)`` answers itself. The step is copied: its state and the global random state do not
    change.

    Arguments:
        step: a chain (`rewriter.chain`) or another module, a class or factory, or a name that a spec could use.
        tensor: the value.
        arguments: for the constructor; ``weight`` and ``size`` are filled in.
        tolerance: relative to the value's size; by default ``1e3 * n * eps``.

    Raises:
        RewriterError: a step has no right inverse, so that membership cannot be tested.
    """
    with nothing_drawn():
        module = copy.deepcopy(instance(step, tensor, arguments or {})[0]).eval()
        allowed = default_tolerance(tensor) if tolerance is None else tolerance
        if not tensor.isfinite().all():
            return False
        contains: Any = getattr(module, "contains", None)
        if contains is not None:
            return bool(contains(tensor, allowed))
        for part in module if isinstance(module, Chain) else [module]:
            if not hasattr(part, "right_inverse"):
                raise RewriterError(f"on_space needs right inverses, and {type(part).__name__} has no right_inverse")
        try:
            value = module(*inverse(module, tensor))
        except NotApplicable as reason:
            raise RewriterError(f"on_space needs right inverses, and {type(module).__name__} has none") from reason
        except (RewriterError, ValueError):  # refusals: ValueError is that of torch and geotorch
            return False
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
        return False
    return distance(value, tensor) <= allowed * size_of(tensor)
