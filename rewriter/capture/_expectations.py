"""Functions of an exported graph: checks of the inputs that it was captured for, and choices by the mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter._given import kind_of
from rewriter._torch import pytree, set_grad_enabled
from rewriter.errors import CaptureError
from rewriter.serialization import graph_function, structure_from_text


@graph_function
def expect_shape(value: Any, shape: list[int | None], name: str) -> None:
    """Refuse an input of another shape than the graph was captured for; `None` stands for any size."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(value, Tensor):
        raise CaptureError(f"{name} was a tensor when the model was captured, and is {kind_of(value)} now")
    found = list(value.shape)
    if len(found) != len(shape) or any(want is not None and size != want for size, want in zip(found, shape)):  # noqa: B905
        wanted = [("any" if size is None else size) for size in shape]
        raise CaptureError(
            f"{name} has shape {found}; the model was captured for {wanted} (say which sizes vary: dynamic_shapes)"
        )


@graph_function
def expect_value(value: Any, expected: Any, name: str) -> None:
    """Refuse another value than the one that the graph was captured for."""
    if torch.compiler.is_compiling() or (type(value) is type(expected) and value == expected):
        return
    shown = type(value).__name__ if isinstance(value, Tensor) else repr(value)
    raise CaptureError(f"{name} was {expected!r} when the model was captured, and is {shown} now")


@graph_function
def expect_mode(training: bool, expected: bool) -> None:
    """Refuse the mode that the graph was not captured in."""
    if training is not expected:
        modes = ("train", "eval") if expected else ("eval", "train")
        raise CaptureError(
            f"the model was captured in {modes[0]} mode, and its graph in {modes[1]} mode is another one; "
            f"capture it again in {modes[1]} mode, or with capture='module'"
        )


@graph_function
def by_mode(training: bool, train: Any, eval: Any) -> Any:
    """Return what an operation is given in the mode that is on."""
    return train if training else eval


@graph_function
def add_in_training(training: bool, tensor: Tensor, amount: int) -> None:
    """Count in train mode, as batch norms do."""
    if training:
        tensor.add_(amount)


@graph_function
def begin_grad_mode(enabled: bool) -> bool:
    """Set whether gradients are recorded; return whether they were."""
    before = torch.is_grad_enabled()
    set_grad_enabled(enabled)
    return before


@graph_function
def end_grad_mode(before: bool) -> None:
    """SiteSpec gradients as before."""
    set_grad_enabled(before)


@graph_function
def rebuild(leaves: list[Any], structure: str) -> Any:
    """Return the model's own structure of outputs, one that torch knows by name."""
    return pytree.tree_unflatten(leaves, structure_from_text(structure))
