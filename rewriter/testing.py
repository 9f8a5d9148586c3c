"""Check that a parametrization keeps the laws that the compiler and torch rely on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter._given import kind_of
from rewriter.context._random import nothing_drawn
from rewriter.errors import RewriterError
from rewriter.parametrizations import _registry

__all__ = ["LAWS", "LawError", "Report", "check_parametrization"]


class LawError(RewriterError, AssertionError):
    """A parametrization that violates laws; carries the report."""

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(str(report))


@dataclass(frozen=True)
class Report:
    """What came out of each law: ``"holds"``, ``"does not apply: …"`` or what was found.

    Arguments:
        subject: the parametrization, printed.
        results: the outcome of each law by its name.
    """

    subject: str
    results: Mapping[str, str]

    @property
    def violated(self) -> dict[str, str]:
        """The laws that do not hold, with what was found."""
        return {law: found for law, found in self.results.items() if not found.startswith(("holds", "does not apply"))}

    def __str__(self) -> str:
        width = max(map(len, self.results), default=0)
        head = f"{self.subject} violates {len(self.violated)} of {len(self.results)} laws"
        return "\n".join([head, *(f"  {law:<{width}}  {found}" for law, found in self.results.items())])


class _NotApplicable(Exception):
    pass


class _Violated(Exception):
    pass


@dataclass(frozen=True)
class _Case:
    module: nn.Module
    build: Callable[[Tensor], nn.Module] | None
    weight: Tensor
    originals: tuple[Tensor, ...]
    tolerance: float

    def value(self) -> Tensor:
        return _tensor(self.module(*self.originals))

    def fresh(self, weight: Tensor) -> nn.Module:
        if self.build is None:
            raise _NotApplicable("an instance was given, not a class that can be built for another shape")
        return self.build(weight).eval()


def check_parametrization(
    subject: nn.Module | Callable[..., nn.Module] | str,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
    arguments: Mapping[str, Any] | None = None,
    originals: Sequence[Tensor] | None = None,
    skip: Collection[str] = (),
    tolerance: float | None = None,
    seed: int = 0,
) -> Report:
    """Check the laws of a parametrization and return what came out of each.

    >>> report = check_parametrization("skew", (3, 3))
    >>> report.results["right inverse"]
    'holds'

    The global random state is left as it is.

    Arguments:
        subject: a module, a class or factory, or a name that a spec could use.
        shape: of the weight.
        dtype: of the weight. Gradients are checked in float64 and complex128 only, where differences tell.
        arguments: for the constructor; ``weight`` and ``size`` are filled in.
        originals: the stored tensors to evaluate at. Without them, what the right inverse gives for a random weight,
            moved a little; the weight itself where there is no right inverse.
        skip: names of laws (see ``LAWS``) that are not meant to hold, such as ``"gradient"`` of a quantizer.
        tolerance: for two values that should be equal, relative to their size; by default ``1e3 * n * eps``.
        seed: of the random weight.

    Raises:
        LawError: a law does not hold; the message lists every law.
        ValueError: `skip` names no law.
    """
    unknown = set(skip) - set(LAWS)
    if unknown:
        raise ValueError(f"no law is called {sorted(unknown)}; there are {list(LAWS)}")
    with nothing_drawn(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*|Complex modules are a new feature")
        torch.manual_seed(seed)
        case = _case(subject, shape, dtype, arguments or {}, originals, tolerance)
        results = {
            law: "does not apply: skipped" if law in skip else _outcome(check, case) for law, check in LAWS.items()
        }
    report = Report(str(case.module).splitlines()[0], results)
    if report.violated:
        raise LawError(report)
    return report


def _case(
    subject: nn.Module | Callable[..., nn.Module] | str,
    shape: Sequence[int],
    dtype: torch.dtype,
    arguments: Mapping[str, Any],
    originals: Sequence[Tensor] | None,
    tolerance: float | None,
) -> _Case:
    weight = torch.randn(*shape, dtype=dtype)
    if isinstance(subject, str):
        subject = _registry.find(subject)
    build: Callable[[Tensor], nn.Module] | None = None
    if not isinstance(subject, nn.Module):
        factory = subject

        def build(weight: Tensor) -> nn.Module:
            return _registry.construct(factory, weight, arguments)

        module = build(weight)
    else:
        module = subject
    if originals is None:
        originals = [
            X + 0.1 * torch.randn_like(X) if X.is_floating_point() or X.is_complex() else X
            for X in _start(module, weight)
        ]
    if tolerance is None:
        tolerance = 1e3 * max(shape, default=1) * torch.finfo(dtype).eps
    return _Case(module.eval(), build, weight, tuple(originals), tolerance)


def _outcome(check: Callable[[_Case], None], case: _Case) -> str:
    try:
        check(case)
    except _NotApplicable as reason:
        return f"does not apply: {reason}"
    except _Violated as found:
        return str(found)
    except Exception as error:  # whatever user code raises is what was found
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return "holds"


def _shape(case: _Case) -> None:
    value = case.value()
    if getattr(case.module, "preserves_shape", True) and value.shape != case.weight.shape:
        raise _Violated(f"a weight of shape {list(case.weight.shape)} became one of shape {list(value.shape)}")


def _dtype(case: _Case) -> None:
    if case.value().dtype != case.weight.dtype:
        raise _Violated(f"a weight of {case.weight.dtype} became one of {case.value().dtype}")


def _right_inverse(case: _Case) -> None:
    value = case.value().detach()
    module = copy.deepcopy(case.module)
    again = _tensor(module(*_inverse(module, value)))
    _require_equal(again, value, case, "forward(right_inverse(W)) is not W, for a W of the image")


def _projection(case: _Case) -> None:
    module = copy.deepcopy(case.module)
    try:
        stored = _inverse(module, case.weight)
    except RewriterError as refused:
        raise _NotApplicable(f"a random weight is refused ({refused})") from None
    value = _tensor(module(*stored)).detach()
    again = _tensor(module(*_inverse(module, value)))
    _require_equal(again, value, case, "the value nearest to a random weight is not its own nearest value")


def _sample(case: _Case) -> None:
    draw: Any = getattr(case.module, "sample", None)
    if draw is None:
        raise _NotApplicable("it has no sample()")
    value = draw()
    if value.shape != case.weight.shape or value.dtype != case.weight.dtype:
        raise _Violated(f"sample() gave {value.dtype} of shape {list(value.shape)}")
    module = copy.deepcopy(case.module)
    _require_equal(_tensor(module(*_inverse(module, value))), value, case, "sample() is not in the image of forward")


def _gradient(case: _Case) -> None:
    torch.autograd.gradcheck(case.module, _differentiable(case))


def _second_gradient(case: _Case) -> None:
    torch.autograd.gradgradcheck(case.module, _differentiable(case))


def _hard_points(case: _Case) -> None:
    """Values and gradients stay finite where square roots, norms and eigenvalues have none."""
    for name, make in _HARD_POINTS.items():
        points = [make(X).requires_grad_() if X.is_floating_point() or X.is_complex() else X for X in case.originals]
        try:
            value = _tensor(case.module(*points))
        except RewriterError:
            continue
        if not value.isfinite().all():
            raise _Violated(f"the value is not finite where the stored tensors are {name}")
        wanted = [X for X in points if X.requires_grad]
        if not value.requires_grad:
            continue
        gradients = torch.autograd.grad(value, wanted, torch.ones_like(value), allow_unused=True)
        if not all(g is None or bool(g.isfinite().all()) for g in gradients):
            raise _Violated(f"the gradient is not finite where the stored tensors are {name}")


def _identity(X: Tensor) -> Tensor:
    if X.ndim < 2:
        return torch.ones_like(X)
    return torch.eye(X.size(-2), X.size(-1), dtype=X.dtype).expand_as(X).clone()


_HARD_POINTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "one": torch.ones_like,
    "the identity": _identity,
}


def _batching(case: _Case) -> None:
    if not getattr(case.module, "batched", False):
        raise _NotApplicable("it does not say that it is batched")
    single = case.fresh(case.weight)
    both = case.fresh(torch.stack([case.weight, case.weight]))
    inputs = [(X, 0.5 * X) for X in case.originals]
    stacked = _tensor(both(*(torch.stack(pair) for pair in inputs)))
    apart = torch.stack([_tensor(single(*(pair[i] for pair in inputs))) for i in range(2)])
    _require_equal(stacked, apart, case, "a batch is not the stack of its members' values")


def _determinism(case: _Case) -> None:
    if not torch.equal(case.value(), case.value()):
        raise _Violated("two evaluations in eval mode differ")


def _state(case: _Case) -> None:
    for training in (False, True):
        module = copy.deepcopy(case.module).train(training)
        before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        module(*case.originals)
        changed = [key for key, tensor in module.state_dict().items() if not torch.equal(tensor, before[key])]
        if changed and not (training and getattr(module, "stateful", False)):
            mode = "train mode without declaring `stateful = True`" if training else "eval mode"
            raise _Violated(f"forward changed {changed} in {mode}")


def _copying(case: _Case) -> None:
    again = copy.deepcopy(case.module)
    again.load_state_dict(case.module.state_dict())
    if not torch.equal(_tensor(again(*case.originals)), case.value()):
        raise _Violated("a copy with the same state dict has another value")


def _conversion(case: _Case) -> None:
    """`model.float()` and `model.double()` take all along that the value is computed from."""
    other = _OTHER.get(case.weight.dtype)
    if other is None:
        raise _NotApplicable(f"a model is not converted from {case.weight.dtype}")
    module = copy.deepcopy(case.module).to(other)
    originals = [X.to(other) if X.dtype == case.weight.dtype else X for X in case.originals]
    value = _tensor(module(*originals))
    if value.dtype not in (other, case.value().dtype):
        raise _Violated(f"after .to({other}) it gave {value.dtype}")


_OTHER = {
    torch.float64: torch.float32,
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex128: torch.complex64,
    torch.complex64: torch.complex128,
}


def _scripting(case: _Case) -> None:
    scripted = torch.jit.script(copy.deepcopy(case.module))
    _require_equal(_tensor(scripted(*case.originals)), case.value(), case, "the scripted module has another value")


def _export(case: _Case) -> None:
    inputs = tuple(X.detach() for X in case.originals)
    exported = torch.export.export(copy.deepcopy(case.module), inputs).module()
    _require_equal(_tensor(exported(*inputs)), case.value(), case, "the exported module has another value")


LAWS: dict[str, Callable[[_Case], None]] = {
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


def _inverse(module: nn.Module, value: Tensor) -> tuple[Tensor, ...]:
    inverse: Any = getattr(module, "right_inverse", None)
    if inverse is None:
        raise _NotApplicable("it has no right_inverse")
    try:
        found = inverse(value)
    except NotImplementedError as reason:
        raise _NotApplicable(str(reason)) from None
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _start(module: nn.Module, weight: Tensor) -> tuple[Tensor, ...]:
    draw: Any = getattr(module, "sample", None)
    try:
        return _inverse(module, weight)
    except _NotApplicable:
        return (weight,)
    except RewriterError:
        return (weight,) if draw is None else _inverse(module, draw())


def _differentiable(case: _Case) -> tuple[Tensor, ...]:
    if case.weight.dtype not in (torch.float64, torch.complex128):
        raise _NotApplicable("differences tell nothing in this precision")
    originals = tuple(
        X.detach().clone().requires_grad_(X.is_floating_point() or X.is_complex()) for X in case.originals
    )
    if not case.module(*originals).requires_grad:
        raise _NotApplicable("its value needs no gradient")
    return originals


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise _Violated(f"forward returned {kind_of(value)}, not a tensor")
    return value


def _require_equal(found: Tensor, wanted: Tensor, case: _Case, sentence: str) -> None:
    if found.shape != wanted.shape:
        raise _Violated(f"{sentence}: shapes {list(found.shape)} and {list(wanted.shape)}")
    difference = (found - wanted).abs().max().item() if found.numel() else 0.0
    size = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    if not difference <= case.tolerance * size:
        raise _Violated(f"{sentence}: they differ by {difference:.2g}, more than {case.tolerance * size:.2g}")
