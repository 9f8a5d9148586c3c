"""The laws, each a function that raises `Violated` or `NotApplicable`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.testing._case import Case, NotApplicable, Violated, inverse, tensor


def _shape(case: Case) -> None:
    value = case.value()
    if getattr(case.module, "preserves_shape", True) and value.shape != case.weight.shape:
        raise Violated(f"a weight of shape {list(case.weight.shape)} became one of shape {list(value.shape)}")


def _dtype(case: Case) -> None:
    if case.value().dtype != case.weight.dtype:
        raise Violated(f"a weight of {case.weight.dtype} became one of {case.value().dtype}")


def _right_inverse(case: Case) -> None:
    value = case.value().detach()
    module = copy.deepcopy(case.module)
    again = tensor(module(*inverse(module, value)))
    case.require_equal(again, value, "forward(right_inverse(W)) is not W, for a W of the image")


def _projection(case: Case) -> None:
    module = copy.deepcopy(case.module)
    try:
        stored = inverse(module, case.weight)
    except RewriterError as refused:
        raise NotApplicable(f"a random weight is refused ({refused})") from None
    value = tensor(module(*stored)).detach()
    again = tensor(module(*inverse(module, value)))
    case.require_equal(again, value, "the value nearest to a random weight is not its own nearest value")


def _sample(case: Case) -> None:
    draw: Any = getattr(case.module, "sample", None)
    if draw is None:
        raise NotApplicable("it has no sample()")
    value = draw()
    if value.shape != case.weight.shape or value.dtype != case.weight.dtype:
        raise Violated(f"sample() gave {value.dtype} of shape {list(value.shape)}")
    module = copy.deepcopy(case.module)
    case.require_equal(tensor(module(*inverse(module, value))), value, "sample() is not in the image of forward")


def _gradient(case: Case) -> None:
    torch.autograd.gradcheck(case.module, _differentiable(case))


def _second_gradient(case: Case) -> None:
    torch.autograd.gradgradcheck(case.module, _differentiable(case))


def _hard_points(case: Case) -> None:
    """Values and gradients stay finite where square roots, norms and eigenvalues have none."""
    for name, make in _HARD_POINTS.items():
        points = [make(X).requires_grad_() if X.is_floating_point() or X.is_complex() else X for X in case.originals]
        try:
            value = tensor(case.module(*points))
        except RewriterError:
            continue
        if not value.isfinite().all():
            raise Violated(f"the value is not finite where the originals are {name}")
        wanted = [X for X in points if X.requires_grad]
        if not value.requires_grad:
            continue
        gradients = torch.autograd.grad(value, wanted, torch.ones_like(value), allow_unused=True)
        if not all(g is None or bool(g.isfinite().all()) for g in gradients):
            raise Violated(f"the gradient is not finite where the originals are {name}")


def _identity(X: Tensor) -> Tensor:
    if X.ndim < 2:
        return torch.ones_like(X)
    return torch.eye(X.size(-2), X.size(-1), dtype=X.dtype).expand_as(X).clone()


_HARD_POINTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "one": torch.ones_like,
    "the identity": _identity,
}


def _batching(case: Case) -> None:
    if not getattr(case.module, "batched", False):
        raise NotApplicable("it does not declare `batched = True`")
    single = case.fresh(case.weight)
    both = case.fresh(torch.stack([case.weight, case.weight]))
    inputs = [(X, 0.5 * X) for X in case.originals]
    stacked = tensor(both(*(torch.stack(pair) for pair in inputs)))
    apart = torch.stack([tensor(single(*(pair[i] for pair in inputs))) for i in range(2)])
    case.require_equal(stacked, apart, "a batch is not the stack of its members' values")


def _determinism(case: Case) -> None:
    if not torch.equal(case.value(), case.value()):
        raise Violated("two evaluations in eval mode differ")


def _state(case: Case) -> None:
    for training in (False, True):
        module = copy.deepcopy(case.module).train(training)
        before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        module(*case.originals)
        changed = [key for key, tensor in module.state_dict().items() if not torch.equal(tensor, before[key])]
        if changed and not (training and getattr(module, "stateful", False)):
            mode = "train mode without declaring `stateful = True`" if training else "eval mode"
            raise Violated(f"forward changed {changed} in {mode}")


def _copying(case: Case) -> None:
    again = copy.deepcopy(case.module)
    again.load_state_dict(case.module.state_dict())
    if not torch.equal(tensor(again(*case.originals)), case.value()):
        raise Violated("a copy with the same state dict has another value")


def _conversion(case: Case) -> None:
    """`model.float()` and `model.double()` convert everything that the value is computed from."""
    other = _OTHER.get(case.weight.dtype)
    if other is None:
        raise NotApplicable(f"a model is not converted from {case.weight.dtype}")
    module = copy.deepcopy(case.module).to(other)
    originals = [X.to(other) if X.dtype == case.weight.dtype else X for X in case.originals]
    value = tensor(module(*originals))
    if value.dtype not in (other, case.value().dtype):
        raise Violated(f"after .to({other}) it gave {value.dtype}")


_OTHER = {
    torch.float64: torch.float32,
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex128: torch.complex64,
    torch.complex64: torch.complex128,
}


def _scripting(case: Case) -> None:
    scripted = torch.jit.script(copy.deepcopy(case.module))
    case.require_equal(tensor(scripted(*case.originals)), case.value(), "the scripted module has another value")


def _export(case: Case) -> None:
    inputs = tuple(X.detach() for X in case.originals)
    exported = torch.export.export(copy.deepcopy(case.module), inputs).module()
    case.require_equal(tensor(exported(*inputs)), case.value(), "the exported module has another value")


LAWS: dict[str, Callable[[Case], None]] = {
    "shape": _shape,
    "dtype": _dtype,
    "right inverse": _right_inverse,
    "projection": _projection,
    "sample": _sample,
    "gradient": _gradient,
    "second gradient": _second_gradient,
    "hard points": _hard_points,
    "batching": _batching,
    "determinism": _determinism,
    "state": _state,
    "copying": _copying,
    "conversion": _conversion,
    "scripting": _scripting,
    "export": _export,
}
"""The laws by name, in the order in which they are checked."""


def _differentiable(case: Case) -> tuple[Tensor, ...]:
    if case.weight.dtype not in (torch.float64, torch.complex128):
        raise NotApplicable("finite differences are too coarse in this precision")
    originals = tuple(
        X.detach().clone().requires_grad_(X.is_floating_point() or X.is_complex()) for X in case.originals
    )
    if not case.module(*originals).requires_grad:
        raise NotApplicable("its value needs no gradient")
    return originals
