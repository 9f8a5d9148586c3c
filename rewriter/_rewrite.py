"""rewrite: put the parametrizations of a spec into a model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rewriter._pause import collector_paused
from rewriter.errors import CaptureError
from rewriter.passes import (
    Rewriting,
    cache_pass,
    insert_pass,
    open_pass,
    outline,
    prune_pass,
    run_passes,
    verify_against,
)
from rewriter.planning._prepare import Prepared, prepare
from rewriter.planning._resolve import Claim
from rewriter.planning._survey import Entry
from rewriter.runtime import ParametrizedTensor, RewrittenModule, Session, attach, open_graph_owners, open_path, site_path
from rewriter.runtime._memory import refill, shared_storages
from rewriter.spec import Spec, load_spec


@torch.inference_mode(False)
def rewrite(model: nn.Module, spec: Any, *, capture: str = "auto", inplace: bool = False) -> nn.Module:
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
        model: any module, or a GraphModule.
        spec: a `Spec`, or anything `load_spec` takes.
        capture: ``"auto"`` traces the model and falls back to keeping its class where it cannot be traced;
            ``"graph"`` and ``"module"`` ask for one of the two.
        inplace: reuse the model's own modules and Parameter objects, so that an optimizer stays valid. A model that
            was traced still comes back as a new module, over the same tensors.

    Raises:
        SpecError: the spec cannot be read.
        PlanError: the spec does not fit the model; the model is as it was.
        CaptureError: the capture asked for is not possible.
    """
    if capture not in ("auto", "graph", "module"):
        raise CaptureError(f"capture is 'auto', 'graph' or 'module', not {capture!r}")
    read = spec if isinstance(spec, Spec) else load_spec(spec)
    with collector_paused():
        return _rewrite(model if inplace else _copied(model), read, capture)


def _rewrite(target: nn.Module, spec: Spec, capture: str) -> nn.Module:
    prepared = prepare(target, spec, capture)
    if not prepared.new:
        return target
    session = attach_sites(prepared)
    if prepared.capture.root == "module":
        target = open_graph_owners(target)
        open_path(target, (name for _, site in prepared.new for name in site.record.names), session)
        return target
    return _rewrite_graph(target, prepared, session)


def attach_sites(prepared: Prepared) -> Session:
    """Put the sites that were built into the model's modules; from here on the model is another one."""
    session = prepared.present[0][1].session if prepared.present else Session()
    order = {id(entry): index for index, entry in enumerate(prepared.entries)}
    shared = shared_storages(entry.tensor for entry in prepared.entries if entry.tensor is not None)
    for claim, site in sorted(prepared.new, key=lambda pair: order[id(pair[0].entries[0])]):
        _attach(claim, site, session, shared)
    _connect(prepared)
    return session


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as problem:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({problem}); detach what it caches, or use inplace=True"
        ) from problem


def _attach(claim: Claim, site: ParametrizedTensor, session: Session, shared: frozenset[int]) -> None:
    site.session = session
    _keep_parameters(claim, site, shared)
    places: dict[int, tuple[nn.Module, list[str]]] = {}
    for entry in claim.entries:
        for owner, tensor in entry.owners:
            places.setdefault(id(owner), (owner, []))[1].append(tensor)
    for owner, tensors in places.values():
        groups = [tensors] if len(claim.entries) > 1 else [[tensor] for tensor in tensors]
        for group in groups:
            attach(owner, group, site)


def _keep_parameters(claim: Claim, site: ParametrizedTensor, shared: frozenset[int]) -> None:
    """Store the originals in the model's own Parameter objects where the shapes allow it."""
    free = [entry.tensor for entry in claim.entries if isinstance(entry.tensor, nn.Parameter)]
    for name in site.original_names:
        original = getattr(site, name)
        for index, parameter in enumerate(free):
            if isinstance(original, nn.Parameter) and _same_form(parameter, original):
                refill(parameter, original.data, shared)
                parameter.requires_grad = original.requires_grad
                site._parameters[name] = parameter
                del free[index]
                break


def _same_form(one: nn.Parameter, other: nn.Parameter) -> bool:
    same = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return same and not one.is_inference()  # it could never be trained


def _connect(prepared: Prepared) -> None:
    """Tell each site that reads other tensors where they are."""
    entries = {name: entry for entry in prepared.entries for name in entry.names}
    for _, site in prepared.new:
        if site.record.reads:
            site.place_inputs([_place(entries[name]) for name in site.record.reads])


def _place(entry: Entry) -> tuple[nn.Module, str]:
    return entry.owners[0]


def rewriting_of(root: nn.Module, prepared: Prepared, session: Session) -> Rewriting:
    """Return what the passes work on: the captured graph and the sites attached to `root`."""
    graph = prepared.capture.graph
    assert graph is not None
    sites = [site for _, site in (*prepared.new, *prepared.present)]
    return Rewriting(
        root=root,
        graph=graph,
        paths={site: site_path(site) for site in sites},
        sites={name: site for site in sites for name in site.record.names},
        session=session,
        order=sites,
    )


def _rewrite_graph(root: nn.Module, prepared: Prepared, session: Session) -> nn.Module:
    rewriting = rewriting_of(root, prepared, session)
    graph = rewriting.graph
    before = outline(graph)
    run_passes(rewriting, [open_pass, insert_pass, cache_pass, prune_pass, verify_against(before)])
    if isinstance(root, RewrittenModule):
        root.graph = graph
        return root
    return RewrittenModule(root, graph)
