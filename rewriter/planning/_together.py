"""Arguments that a parametrization decides over all sites of a rule: a global budget, a file with a mask for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.planning._construct import BuildError, arguments_of, layout_of_claim, seen_by
from rewriter.planning._resolve import Claim

Arguments = list[Mapping[str, Any]]
"""One mapping for each chunk of a tensor; one alone where it is whole."""


def planned_together(claims: Sequence[Claim], inputs: Mapping[str, Tensor]) -> dict[int, dict[int, Arguments]]:
    """Ask each step's ``plan_sites`` for the constructor arguments of every site.

    Arguments:
        claims: all claims of one rule.
        inputs: values of the further tensors that the chain reads, by name.

    Returns:
        For each claim, by its `id`: the arguments of its steps, by the step's index.

    Raises:
        BuildError: a planner refuses what it is given.
    """
    extra: dict[int, dict[int, Arguments]] = {id(claim): {} for claim in claims}
    chain = claims[0].rule.chain
    # Later steps first: what an earlier one prunes is what they map to the tensors.
    for index in reversed(range(len(chain))):
        planner = getattr(chain[index].factory, "plan_sites", None)
        if planner is None:
            continue
        weights: list[Tensor] = []
        names: list[str] = []
        counts: list[int] = []
        for claim in claims:
            seen = seen_by(claim, index, inputs, extra[id(claim)])
            parts = [*seen.unbind(0)] if layout_of_claim(claim).chunks else [seen]
            weights += parts
            names += [claim.name] * len(parts)
            counts.append(len(parts))
        try:
            found = iter(_ask(planner, weights, names, arguments_of(chain[index])))
        except (RewriterError, TypeError, ValueError) as problem:
            raise BuildError(f"step {index + 1}, {chain[index]}: {problem}") from problem
        for claim, count in zip(claims, counts, strict=True):
            extra[id(claim)][index] = [next(found) for _ in range(count)]
    return extra


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
