"""Arguments that a parametrization decides over all sites of a rule: a global budget, a file with a mask for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.planning._chain import BuildError, Chain, arguments_of
from rewriter.planning._resolve import Claim


def planned_together(claims: Sequence[Claim], inputs: Mapping[str, Tensor]) -> dict[int, Chain]:
    """Ask each step's ``plan_sites`` for the constructor arguments of every site.

    Arguments:
        claims: all claims of one rule.
        inputs: values of the further tensors that the chain reads, by name.

    Returns:
        For each claim, by its `id`: its chain, constructed down to the first step that has such arguments. Empty for
        a rule without such steps.

    Raises:
        BuildError: a planner refuses the tensors.
    """
    steps = claims[0].rule.chain
    planners = {index: getattr(step.factory, "plan_sites", None) for index, step in enumerate(steps)}
    if not any(planners.values()):
        return {}
    chains = {id(claim): Chain(claim, inputs) for claim in claims}
    # Later steps first: an earlier step sees what their right inverses give.
    for index, planner in reversed(planners.items()):
        if planner is None:
            continue
        weights: list[Tensor] = []
        names: list[str] = []
        counts: list[int] = []
        for claim in claims:
            chain = chains[id(claim)]
            seen = chain.seen(index)
            parts = [*seen.unbind(0)] if chain.layout.chunks else [seen]
            weights += parts
            names += [claim.name] * len(parts)
            counts.append(len(parts))
        try:
            found = iter(_ask(planner, weights, names, arguments_of(steps[index])))
        except (RewriterError, TypeError, ValueError) as problem:
            raise BuildError(f"step {index + 1}, {steps[index]}: {problem}") from problem
        for claim, count in zip(claims, counts, strict=True):
            chains[id(claim)].extra[index] = [next(found) for _ in range(count)]
    return chains


def _ask(
    planner: Callable[..., Sequence[Mapping[str, Any]]],
    weights: Sequence[Tensor],
    names: Sequence[str],
    arguments: Mapping[str, Any],
) -> Sequence[Mapping[str, Any]]:
    wants_names = "names" in inspect.signature(planner).parameters
    found = planner(weights, names=names, **arguments) if wants_names else planner(weights, **arguments)
    if len(found) != len(weights):
        raise ValueError(f"plan_sites gave {len(found)} sets of arguments for {len(weights)} tensors")
    return found
