"""The numeric check after a rewrite: what should not have moved has not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter._bake import bake
from rewriter.errors import NumericError
from rewriter.planning import Plan

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


def verify_rewritten(
    before: nn.Module, rewritten: nn.Module, plan: Plan, examples: tuple[Any, ...] | None = None
) -> Checks:
    """Compare a rewritten model, baked, with the model it was made from.

    Arguments:
        before: the model that was rewritten.
        plan: says which values move.
        examples: inputs on which the rewritten and the baked model must agree.

    Raises:
        NumericError: names every tensor that differs.
    """
    baked = bake(rewritten)
    old, new = before.state_dict(), baked.state_dict()
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
    outputs = None if examples is None else _compare_outputs(rewritten, baked, examples, problems)
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
    scale = float(old.abs().max())
    return float((old - new).abs().max()) / (scale or 1.0)


@torch.no_grad()
def _compare_outputs(rewritten: nn.Module, baked: nn.Module, examples: tuple[Any, ...], problems: list[str]) -> float:
    modes = {module: module.training for module in (*rewritten.modules(), *baked.modules())}
    rewritten.eval()
    baked.eval()
    try:
        pairs = zip(_tensors(rewritten(*examples)), _tensors(baked(*examples)), strict=True)
        differences = [(_difference(one, other), other.dtype) for one, other in pairs]
    finally:
        for module, training in modes.items():
            module.training = training
    for difference, dtype in differences:
        if not difference <= _TOLERANCE.get(dtype, 0.0):
            problems.append(f"the outputs of the rewritten and the baked model differ by {difference:.1e}")
    return max((difference for difference, _ in differences), default=0.0)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
