"""The numeric check after a rewrite: values that must not move have not moved."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rewriter._bake import bake
from rewriter._torch import pytree
from rewriter.absorbing import taken_over
from rewriter.capture import Call
from rewriter.cli._models import entries_of, state_of
from rewriter.cli._text import counted
from rewriter.errors import CaptureError, NumericError
from rewriter.export._job import copied_call
from rewriter.planning import Plan

Model = nn.Module | ExportedProgram

_UNMOVED = 1e-6
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Checks:
    """The result of the comparison.

    Arguments:
        kept: number of tensors outside all sites, which are equal bit by bit.
        unmoved: number of tensors whose value must not move, equal within rounding.
        computed: number of computed tensors for each chain.
        largest_difference: of all computed tensors, relative to the largest entry of the plain tensor.
        outputs: largest difference between the outputs of the rewritten and of the baked model; ``None`` without
            example inputs.
    """

    kept: int
    unmoved: int
    computed: dict[str, int]
    largest_difference: float
    outputs: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        texts = [f"{counted(count, 'tensor')} computed by {chain!r}" for chain, count in self.computed.items()]
        if texts:
            texts[-1] += f" (largest difference from the plain model {self.largest_difference:.2g})"
        texts.append(f"{self.kept} unchanged")
        if self.outputs is not None:
            texts.append(f"outputs of the baked model differ by {self.outputs:.2g}")
        return "; ".join(texts)


def verify_rewritten(before: Model, rewritten: Model, plan: Plan, examples: Call | None = None) -> Checks:
    """Compare a rewritten model, after baking, with the plain model.

    Arguments:
        before: the plain model.
        plan: says which values move.
        examples: inputs on which the rewritten and the baked model must agree. They are not used for a program in
            train mode with a chain that has another value in evaluation mode.

    Raises:
        NumericError: names every tensor that differs.
        CaptureError: the model fails on the example inputs.
    """
    baked = bake(rewritten)
    # Tensors that were computed before are compared by value.
    if isinstance(before, nn.Module) and any(site.spec.rule.startswith("absorbed:") for site in plan):
        before = taken_over(before)
    plain = bake(before) if any(entry.site is not None for entry in entries_of(before)) else before
    old, new = state_of(plain), state_of(baked)
    problems: list[str] = []
    if list(old) != list(new):
        problems.append(f"the baked model has other tensors: {sorted(set(old) ^ set(new)) or 'in another order'}")
    moved = {name: site.moved for site in plan for name in site.names}
    kept = [name for name in old if name in new and name not in moved]
    problems += [f"{name} changed, though no rule owns it" for name in kept if not _same(old[name], new[name])]
    differences = {name: _difference(old[name], new[name]) for name in moved if name in old and name in new}
    unmoved = {name for name in differences if (far := moved[name]) is not None and far < _UNMOVED}
    for name, difference in differences.items():
        if name in unmoved and not difference <= _TOLERANCE.get(new[name].dtype, 0.0):
            problems.append(f"{name} must keep its value and differs by {difference:.1e}")
    outputs = None
    if examples is not None and not _evaluates_otherwise(rewritten):
        outputs = _compare_outputs(rewritten, baked, examples, problems)
    if problems:
        raise NumericError("the rewritten model is not the model it should be:\n  " + "\n  ".join(problems))
    computed = Counter(" >> ".join(step.partition("(")[0] for step in site.chain) for site in plan)
    largest = max((difference for difference in differences.values() if difference < float("inf")), default=0.0)
    return Checks(len(kept), len(unmoved), dict(computed), largest, outputs)


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
    """Whether a chain of this program has another value in evaluation mode."""
    if isinstance(model, nn.Module):
        return False
    from rewriter.program import sites_of_program

    return any(site.evaluation is not None for site in sites_of_program(model))


def _compare_outputs(rewritten: Model, baked: Model, examples: Call, problems: list[str]) -> float:
    largest = 0.0
    for one, other in zip(_outputs(rewritten, examples), _outputs(baked, examples), strict=True):
        difference = _difference(one, other)
        largest = max(largest, difference)
        if not difference <= _TOLERANCE.get(other.dtype, 0.0):
            problems.append(f"the outputs of the rewritten and the baked model differ by {difference:.1e}")
    return largest


@torch.no_grad()
def _outputs(model: Model, examples: Call) -> list[Tensor]:
    """Return the outputs of a copy in evaluation mode."""
    module: nn.Module = copy.deepcopy(model if isinstance(model, nn.Module) else model.module())
    for child in module.modules():  # `eval` is not allowed for a program.
        child.training = False
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            args, kwargs = copied_call(examples)
            outputs = module(*args, **kwargs)
    except Exception as problem:
        reason = str(problem).strip().partition("\n")[0]
        raise CaptureError(f"the model fails on the example inputs: {type(problem).__name__}: {reason}") from problem
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
