"""The graph binding: the captured graph stays with the model, and a lowered copy of it runs."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from rewriter.bindings import RewrittenModule
from rewriter.errors import PlanError
from rewriter.passes import OPTIONAL, lower
from rewriter.sites import Site
from rewriter.sites._places import BATCHES


def lowered_model(root: nn.Module, captured: fx.Graph, without: Collection[str]) -> RewrittenModule:
    """Return `root`, with its sites attached, as a model that runs the lowered graph.

    Arguments:
        root: a plain model, or a rewritten one, which gets a new graph.
        captured: the graph of the model without sites.
        without: names of optional passes to leave out.
    """
    if isinstance(root, RewrittenModule):
        refuse_edited(root)
    root._modules.pop(BATCHES, None)
    sites = [module for module in root.modules() if isinstance(module, Site)]
    graph = lower(root, captured, sites, [step for step in OPTIONAL if step.name not in without])
    if not isinstance(root, RewrittenModule):
        return RewrittenModule(root, captured, graph, without)
    root.take_lowered(graph)
    return root


def lower_again(model: RewrittenModule) -> None:
    """Lower the captured graph of a model again: it has other sites now."""
    lowered_model(model, model.captured, model.without or ())


def refuse_edited(model: RewrittenModule) -> None:
    """Refuse a model whose lowered graph somebody changed: lowering again would lose the change.

    Raises:
        PlanError: the graph is not the one that lowering wrote.
    """
    if model.edited:
        raise PlanError(
            "the graph of the rewritten model was edited after rewriting, and lowering the captured graph again would "
            "lose the edit: edit the graph of the plain model, before rewrite() or after bake()"
        )
