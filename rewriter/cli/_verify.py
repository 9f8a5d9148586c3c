"""The numeric check after a rewrite: what should not have moved has not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rewriter._bake import bake
from rewriter.absorbing import taken_over
from rewriter.cli._models import entries_of, state_of
from rewriter.errors import CaptureError, NumericError
from rewriter.planning import Plan
from rewriter.runtime._random import nothing_drawn

Model = nn.Module | ExportedProgram

_UNMOVED = 1e-6
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Checks:
    """What was compared.

    Arguments:
        kept: tensors outside all sites, equal bit by bit.
        unmoved: sites whose value had to stay, within rounding.
        largest_difference: of all unmoved sites, relative to the largest entry.
        outputs: largest difference between the rewritten and the baked model's outputs; ``None`` without example
            inputs.
    """

    kept: int
    unmoved: int
    largest_difference: float
    outputs: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        texts = [f"{self.kept} tensors as they were"]
        if self.unmoved:
            texts.append(f"{self.unmoved} parametrized ones equal to {self.largest_difference:.1e}")
        if self.outputs is not None:
            texts.append(f"outputs equal to {self.outputs:.1e}")
        return ", ".join(texts)


def verify_rewritten(before: Model, rewritten: Model, plan: Plan, examples: tuple[Any, ...] | None = None) -> Checks:
    """Compare a rewritten model, baked, with the model it was made from.

    Arguments:
        before: the model that was rewritten.
        plan: says which values move.
        examples: inputs on which the rewritten and the baked model must agree, unless it is a program for training
            with chains that compute something else there.

    Raises:
        NumericError: names every tensor that differs.
        CaptureError: the model fails on the example inputs.
    """
    baked = bake(rewritten)
    # What was parametrized before, by us or by others, is compared by its values too.
    if isinstance(before, nn.Module) and any(site.record.rule.startswith("absorbed:") for site in plan):
        before = taken_over(before)
    plain = bake(before) if any(entry.site is not None for entry in entries_of(before)) else before
    old, new = state_of(plain), state_of(baked)
    problems: list[str] = []
    if list(old) != list(new):
        problems.append(f"the baked model has other tensors: {sorted(set(old) ^ set(new)) or 'in another order'}")
    unmoved = {name for site in plan if site.moved is not None and site.moved < _UNMOVED for name in site.names}
    owned = {name for site in plan for name in site.names}
    largest, kept = 0.0, 0
    for name in [name for name in old if name in new]:
        if name not in owned:
            kept += 1
            if not _same(old[name], new[name]):
                problems.append(f"{name} changed, though no rule owns it")
        elif name in unmoved:
            difference = _difference(old[name], new[name])
            largest = max(largest, difference)
            if not difference <= _TOLERANCE.get(new[name].dtype, 0.0):
                problems.append(f"{name} should have kept its value and differs by {difference:.1e}")
    outputs = None
    if examples is not None and not _evaluates_otherwise(rewritten):
        outputs = _compare_outputs(rewritten, baked, examples, problems)
    if problems:
        raise NumericError("the rewritten model is not the model it should be:\n  " + "\n  ".join(problems))
    return Checks(kept, len(unmoved & set(old)), largest, outputs)


def _same(one: Tensor, other: Tensor) -> bool:
    same_form = one.shape == other.shape and one.dtype == other.dtype
    return same_form and bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())


def _difference(old: Tensor, new: Tensor) -> float:
    if old.shape != new.shape or old.dtype != new.dtype:
        return float("inf")
    if not old.numel():
        return 0.0
    scale = old.detach().abs().max().item()
    return (old - new).detach().abs().max().item() / (scale or 1.0)


def _evaluates_otherwise(model: Model) -> bool:
    """Whether a chain computes in this program something else than its value in evaluation mode."""
    if isinstance(model, nn.Module):
        return False
    from rewriter.program import sites_of_program

    return any(site.evaluation is not None for site in sites_of_program(model))


def _compare_outputs(rewritten: Model, baked: Model, examples: tuple[Any, ...], problems: list[str]) -> float:
    pairs = zip(_outputs(rewritten, examples), _outputs(baked, examples), strict=True)
    differences = [(_difference(one, other), other.dtype) for one, other in pairs]
    for difference, dtype in differences:
        if not difference <= _TOLERANCE.get(dtype, 0.0):
            problems.append(f"the outputs of the rewritten and the baked model differ by {difference:.1e}")
    return max((difference for difference, _ in differences), default=0.0)


@torch.no_grad()
def _outputs(model: Model, examples: tuple[Any, ...]) -> list[Tensor]:
    """Return what a model returns in evaluation mode, or a program in its own; neither changes."""
    module: nn.Module = model if isinstance(model, nn.Module) else model.module()
    modes = {child: child.training for child in module.modules()}
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        for child in modes:
            child.training = False
        with nothing_drawn():
            torch.manual_seed(0)
            return _tensors(module(*torch.utils._pytree.tree_map(torch.clone, examples)))
    except Exception as problem:
        reason = str(problem).strip().partition("\n")[0]
        raise CaptureError(f"the model fails on the example inputs: {type(problem).__name__}: {reason}") from problem
    finally:
        for child, training in modes.items():
            child.training = training
        for buffer, value in kept:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
