"""rewrite: put the parametrizations of a spec into a model."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rewriter._attach import attach_sites, keep_parameters
from rewriter._copy import copied
from rewriter._frozen import freeze_rest
from rewriter._given import Model, check_model
from rewriter._optimizers import watch_optimizers
from rewriter._plan import collector_paused, plan_module
from rewriter._remap import Following
from rewriter._undo import undone_on_failure
from rewriter.bindings import RewrittenModule, open_graph_owners, open_path, refuse_replaced
from rewriter.bindings.graph import lowered_model
from rewriter.capture import call_for
from rewriter.errors import RewriterError
from rewriter.language import Spec, load_spec
from rewriter.passes import OPTIONAL
from rewriter.planning import Plan
from rewriter.program import rewrite_program
from rewriter.sites import refuse_mixed


def rewrite(
    model: Model,
    spec: Any,
    *,
    example_inputs: Tensor | Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    capture: str = "auto",
    inplace: bool = False,
    without: Collection[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> Model:
    """Return `model` with the parametrizations of `spec` in it.

    >>> import torch, rewriter
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    >>> spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
    >>> new = rewriter.rewrite(model, spec)
    >>> list(new.state_dict())
    ['0.bias', '0.parametrizations.weight.original']

    Each selected tensor is evaluated once per forward, however often it is used. Rewriting a rewritten model with
    the same spec changes nothing.

    Arguments:
        model: any module, a GraphModule, or an ExportedProgram, which gives an ExportedProgram.
        spec: a `Spec`, anything `load_spec` takes, or a `Plan`. A plan for another model, or for this one before it
            changed, is made again; it is refused if it would have other sites or chains.
        example_inputs: arguments of a call, or its only argument. A captured graph is compared with the model on them,
            and not used where it differs; ``capture="export"`` needs them.
        example_kwargs: keyword arguments of that call.
        dynamic_shapes: for ``capture="export"``, which sizes vary, as for `torch.export.export`.
        capture: ``"auto"`` traces the model and falls back to keeping its class where it cannot be traced;
            ``"graph"`` and ``"module"`` ask for one of the two. ``"export"`` goes through `torch.export` and rewrites
            the graph of ATen operations.
        inplace: reuse the model's own modules and Parameter objects, where shape and dtype allow it. An optimizer lacks
            the parameters that are new: give it as `optimizer`. A model that was traced still comes back as a new
            module, over the same tensors. If it fails, the model is as it was.
        without: passes to leave out: any of ``"batch"``, ``"cast"``, ``"fuse"``, ``"hoist"``, ``"rows"`` and
            ``"transpose"``. They change how fast a model runs, and not what it computes.
        optimizer: over parameters of `model`; changed so that it trains the rewritten model. Groups, names, settings
            and schedulers stay, and state where the coordinates are the same, as `rewriter.state.remap_optimizer` says.
            A warning names the tensors whose state is lost.

    Raises:
        SpecError: the spec cannot be read.
        PlanError: the spec does not fit the model; the model is as it was.
        CaptureError: the capture asked for is not possible.
    """
    without = (without,) if isinstance(without, str) else without
    names = [step.name for step in OPTIONAL]
    unknown = set(without) - set(names)
    if unknown:
        raise RewriterError(f"without: {', '.join(sorted(unknown))} is none of {', '.join(names)}")
    check_model(model, "rewrite")
    following = Following(optimizer, model, "rewrite") if optimizer is not None else None
    given = spec.origin if isinstance(spec, Plan) else None
    if given is None:
        read = spec if isinstance(spec, Spec) else load_spec(spec)
        call = call_for(model, capture, example_inputs, example_kwargs, dynamic_shapes)
    else:
        read = spec.spec
        if capture != "auto" or (example_inputs, example_kwargs, dynamic_shapes) != (None, None, None):
            raise RewriterError("a Plan has its capture and example inputs: give them to rewriter.plan")
        capture, call, without = given.mode, given.call, without or given.without
    if isinstance(model, ExportedProgram):
        return rewrite_program(model, spec if given is not None else read, inplace=inplace)  # type: ignore[return-value]
    modules = list(model.modules())
    refuse_mixed(modules)
    for module in modules:
        if isinstance(module, RewrittenModule):
            refuse_replaced(module)
            module.refuse_overridden()
    before = list(model.parameters())
    with torch.inference_mode(False), collector_paused():
        guard = undone_on_failure(model) if inplace else contextlib.nullcontext()
        if given is not None and tuple(without) == tuple(given.without) and not given.change(model):
            if not inplace:
                return _execute(spec.copy(), without, before, following)
            if spec.model is model:
                with guard:
                    return _execute(spec, without, before, following)
        target = model if inplace else copied(model)
        with guard:
            made = plan_module(target, read, capture, call, without)
            if given is not None:
                made.require_same(spec, given.change(model))
            return _execute(made, without, before, following)


def _execute(
    plan: Plan, without: Collection[str], before: Sequence[nn.Parameter], following: Following | None
) -> nn.Module:
    """Put the sites of a plan into its model; `before` are the parameters that an optimizer may have."""
    model: nn.Module = plan.model
    if plan.new or plan.absorbed:
        model = _attached(plan, without)
        watch_optimizers(model, before)
    if plan.spec.trainable == "rewritten":
        freeze_rest(model, (site for _, site in (*plan.new, *plan.present, *plan.absorbed)))
    if following is not None:
        following.follow(model)
    return model


def _attached(plan: Plan, without: Collection[str]) -> nn.Module:
    model: nn.Module = plan.model
    contexts = attach_sites(plan)
    fresh = [site for _, site in (*plan.new, *plan.absorbed)]
    in_place = plan.capture.root == "module"
    if in_place:
        model = open_graph_owners(model)
    open_path(model, (name for site in fresh for name in site.spec.names), contexts, itself=in_place)
    captured = plan.capture.graph
    if captured is not None and not in_place:
        for name, tensor in plan.capture.constants.items():
            model.register_buffer(name, tensor, persistent=False)
        model = lowered_model(model, captured, without)
    keep_parameters(plan)
    return model
