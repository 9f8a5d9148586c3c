"""Steps and rules added to a rewritten model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewriter._append import Longer, longer_sites
from rewriter._bake import _present
from rewriter._copy import copied
from rewriter._frozen import freeze_rest
from rewriter._given import check_model
from rewriter._optimizers import watch_optimizers
from rewriter._remap import Following
from rewriter._rewrite import rewrite
from rewriter.bindings import RewrittenModule
from rewriter.bindings.graph import lower_again, refuse_edited
from rewriter.errors import PlanError, RewriterError
from rewriter.language import Spec, load_spec
from rewriter.planning import resolve, survey


def extend(
    model: nn.Module,
    spec: Any,
    *,
    inplace: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> nn.Module:
    """Return a rewritten model with further rules, and further steps in the chains of its rules.

    >>> import torch, rewriter
    >>> rule = {"name": "w", "select": "0.weight", "chain": ["weight_norm"]}
    >>> model = rewriter.rewrite(torch.nn.Sequential(torch.nn.Linear(3, 3)), {"reparam": 1, "rules": [rule]})
    >>> pruned = extend(model, {"reparam": 1, "rules": [{**rule, "chain": [{"l1_unstructured": {"amount": 4}}]}]})
    >>> int((rewriter.state.get_value(pruned, "0.weight") == 0).sum())
    4

    A rule with another name adds sites. A rule with the name of one that the model has appends its steps to the chains
    of the tensors that it selects, which belong to that rule. The earlier steps then give what the right inverses of
    the new ones ask for, so that the value stays as near as the new steps allow; with ``init: raw`` the earlier steps
    stay as they are. Parameter objects stay. Label a step to bake it alone.

    Arguments:
        model: a rewritten model.
        spec: the further rules, as `rewrite` takes them.
        inplace: without a copy.
        optimizer: over parameters of `model`; changed so that it trains the extended model, as with `rewrite`.
        options: of `rewrite`, for the sites that are added.

    Raises:
        PlanError: a rule does not fit the model, selects a tensor that another rule computes, or appends steps for
            which the chain cannot give a start; the model is as it was.
    """
    check_model(model, "extend", programs=False)
    rules = {site.spec.rule for site in _present(model)}
    if not rules:
        raise RewriterError(f"{type(model).__name__} has no rule yet: use rewriter.rewrite")
    read = load_spec(spec)
    appending = read.model_copy(update={"rules": tuple(rule for rule in read.rules if rule.name in rules)})
    if not appending.rules:
        return rewrite(model, read, inplace=inplace, optimizer=optimizer, **options)
    following = Following(optimizer, model, "extend") if optimizer is not None else None
    before = list(model.parameters())
    target = model if inplace else copied(model)
    longer = _longer(target, appending)
    graphs = [one for one in target.modules() if isinstance(one, RewrittenModule) and one.without is not None]
    for graph in graphs:
        refuse_edited(graph)
    further = tuple(rule for rule in read.rules if rule.name not in rules)
    if further or read.absorb:
        more = read.model_copy(update={"rules": further, "trainable": "as_is"})
        target = rewrite(target, more, inplace=True, **options)
    _append(target, longer)
    watch_optimizers(target, before)
    if read.trainable == "rewritten":
        named = {rule.name for rule in further}
        own = [site for site in _present(target) if site.spec.rule in named]
        freeze_rest(target, [*own, *(one.site for one in longer)])
    if following is not None:
        following.follow(target)
    return target


def _longer(model: nn.Module, spec: Spec) -> list[Longer]:
    claims, problems = resolve(spec, survey(model))
    if problems:
        raise PlanError.of(problems)
    return [one for rule in spec.rules for one in longer_sites(rule, [claim for claim in claims if claim.rule is rule])]


def _append(model: nn.Module, longer: list[Longer]) -> None:
    for one in longer:
        one.apply()
    extended = {one.site for one in longer}
    for graph in [module for module in model.modules() if isinstance(module, RewrittenModule)]:
        if graph.without is not None and extended & set(graph.sites):
            lower_again(graph)
