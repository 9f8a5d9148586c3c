"""Arguments that a parametrization decides over all sites of a rule: a global budget, a file with a mask for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.language import Step
from rewriter.planning._chain import BuildError, Chain, arguments_of
from rewriter.planning._resolve import Claim
from rewriter.sites import Chunked


def planned_together(
    claims: Sequence[Claim], inputs: Mapping[str, Tensor], masks: Mapping[int, Sequence[Any]] | None = None
) -> dict[int, Chain]:
    """Ask each step's ``plan_sites`` for the constructor arguments of every site.

    Arguments:
        claims: all claims of one rule.
        inputs: values of the further tensors that the chain reads, by name.
        masks: for each claim, by its `id`, the masks of the chain to which its steps are appended.

    Returns:
        For each claim, by its `id`: its chain, constructed down to the first step that has such arguments. Empty for
        a rule without such steps.

    Raises:
        BuildError: a planner refuses the tensors.
    """
    steps = claims[0].rule.chain
    masked = masks is not None and any(masks.values())
    runs = [run for run in _runs(steps) if any(_plans(steps[index], len(run) + (masked and 0 in run)) for index in run)]
    if not runs:
        return {}
    chains = {id(claim): Chain(claim, inputs) for claim in claims}
    # Later runs first: an earlier step sees what the right inverses of the later ones give.
    for run in reversed(runs):
        weights: list[Tensor] = []
        names: list[str] = []
        counts: list[int] = []
        for claim in claims:
            chain = chains[id(claim)]
            seen = chain.seen(run[-1])
            parts = [*seen.unbind(0)] if chain.layout.chunks else [seen]
            weights += parts
            names += [claim.name] * len(parts)
            counts.append(len(parts))
        remaining: list[Tensor | None] = [None] * len(weights)
        if masks is not None and 0 in run:
            remaining = [
                _product(masks[id(claim)], part)
                for claim, count in zip(claims, counts, strict=True)
                for part in range(count)
            ]
        for index in run:
            step = steps[index]
            found: Sequence[Mapping[str, Any]]
            if step.module is not None:
                found = [{"chosen_mask": step.module.mask} for _ in weights]
            else:
                try:
                    found = list(_ask(step.factory, weights, names, remaining, arguments_of(step)))
                except (RewriterError, TypeError, ValueError) as problem:
                    raise BuildError(f"step {index + 1}, {step}: {problem}") from problem
                rest = iter(found)
                for claim, count in zip(claims, counts, strict=True):
                    chains[id(claim)].extra[index] = [next(rest) for _ in range(count)]
            remaining = [_both(mask, site.get("chosen_mask")) for mask, site in zip(remaining, found, strict=True)]
    return chains


def _runs(chain: Sequence[Step]) -> list[list[int]]:
    """Return the indices of the steps, adjacent masks together: their right inverses are the identity.

    A mask depends on the masks before it, so that a run is planned first to last.
    """
    runs: list[list[int]] = []
    for index, step in enumerate(chain):
        if runs and _is_mask(step) and _is_mask(chain[index - 1]):
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _is_mask(step: Step) -> bool:
    return getattr(step.factory if step.module is None else step.module, "masks", False) is True


def _plans(step: Step, length: int) -> bool:
    """Return whether a step's arguments are decided for all sites; a mask alone in its run may choose by itself."""
    planner = getattr(step.factory, "plan_sites", None)
    return planner is not None and (length > 1 or getattr(step.factory, "plans_alone", True))


def _product(masks: Sequence[Any], part: int) -> Tensor | None:
    """Return the product of masks, of which some have a mask for each chunk."""
    product: Tensor | None = None
    for mask in masks:
        product = _both(product, getattr(mask[part] if isinstance(mask, Chunked) else mask, "mask"))  # noqa: B009
    return product


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one * other


def _ask(
    factory: Any,
    weights: Sequence[Tensor],
    names: Sequence[str],
    remaining: Sequence[Tensor | None],
    arguments: Mapping[str, Any],
) -> Sequence[Mapping[str, Any]]:
    planner: Callable[..., Sequence[Mapping[str, Any]]] = factory.plan_sites
    wanted = inspect.signature(planner).parameters
    known = {"names": names, "remaining": remaining}
    found = planner(weights, **{name: value for name, value in known.items() if name in wanted}, **arguments)
    if len(found) != len(weights):
        raise ValueError(f"plan_sites gave {len(found)} sets of arguments for {len(weights)} tensors")
    return found
