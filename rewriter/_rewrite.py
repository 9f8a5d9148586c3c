"""rewrite: put the parametrizations of a spec into a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, overload

import torch
from torch import nn
from torch.export import ExportedProgram

from rewriter._absorb import Taken, take_over, taken_over
from rewriter._copy import copied
from rewriter._given import check_capture_name, check_model
from rewriter._pause import collector_paused
from rewriter.capture import Call, call_of
from rewriter.errors import RewriterError
from rewriter.passes import (
    Rewriting,
    batch_pass,
    cache_pass,
    cast_pass,
    expand_pass,
    fuse,
    fuse_pass,
    hoist,
    hoist_pass,
    insert_pass,
    open_pass,
    outline,
    prune_pass,
    run_passes,
    transpose_pass,
    verify_against,
)
from rewriter.planning._prepare import Prepared, prepare
from rewriter.planning._survey import Entry
from rewriter.runtime import (
    ParametrizedTensor,
    RewrittenModule,
    Session,
    attach,
    open_graph_owners,
    open_path,
    refuse_mixed,
    refuse_replaced,
    site_path,
)
from rewriter.runtime._memory import refill, shared_storages
from rewriter.spec import Spec, load_spec

_OPTIONAL = {
    "hoist": hoist_pass,
    "fuse": fuse_pass,
    "cast": cast_pass,
    "transpose": transpose_pass,
    "batch": batch_pass,
}


@overload
def rewrite(
    model: ExportedProgram,
    spec: Any,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    capture: str = "auto",
    inplace: bool = False,
    without: Collection[str] = (),
) -> ExportedProgram: ...


@overload
def rewrite(
    model: nn.Module,
    spec: Any,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    capture: str = "auto",
    inplace: bool = False,
    without: Collection[str] = (),
) -> nn.Module: ...


def rewrite(
    model: nn.Module | ExportedProgram,
    spec: Any,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    capture: str = "auto",
    inplace: bool = False,
    without: Collection[str] = (),
) -> nn.Module | ExportedProgram:
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
        spec: a `Spec`, or anything `load_spec` takes.
        example_inputs: arguments of a call. A captured graph is compared with the model on them, and not used where
            it differs; ``capture="export"`` needs them.
        example_kwargs: keyword arguments of that call.
        dynamic_shapes: for ``capture="export"``, which sizes vary, as for `torch.export.export`.
        capture: ``"auto"`` traces the model and falls back to keeping its class where it cannot be traced;
            ``"graph"`` and ``"module"`` ask for one of the two. ``"export"`` goes through `torch.export` and rewrites
            the graph of ATen operations.
        inplace: reuse the model's own modules and Parameter objects, so that an optimizer stays valid. A model that
            was traced still comes back as a new module, over the same tensors.
        without: passes to leave out: any of ``"batch"``, ``"cast"``, ``"fuse"``, ``"hoist"`` and ``"transpose"``.
            They change how fast a model runs, and not what it computes.

    Raises:
        SpecError: the spec cannot be read.
        PlanError: the spec does not fit the model; the model is as it was.
        CaptureError: the capture asked for is not possible.
    """
    check_capture_name(capture)
    without = (without,) if isinstance(without, str) else without
    unknown = set(without) - _OPTIONAL.keys()
    if unknown:
        raise RewriterError(f"without: {', '.join(sorted(unknown))} is none of {', '.join(_OPTIONAL)}")
    read = spec if isinstance(spec, Spec) else load_spec(spec)
    check_model(model, "rewrite")
    if isinstance(model, ExportedProgram):
        from rewriter.program import check_capture, rewrite_program

        check_capture(capture)
        return rewrite_program(model, read, inplace=inplace)
    modules = list(model.modules())
    refuse_mixed(modules)
    for module in modules:
        if isinstance(module, RewrittenModule):
            refuse_replaced(module)
    call = call_of(example_inputs, example_kwargs, dynamic_shapes)
    with torch.inference_mode(False), collector_paused():
        if read.absorb:
            target, taken = _taken(model, read, capture, inplace, call)
        else:
            target, taken = model if inplace else copied(model), []
        return _rewrite(target, read, capture, without, taken, call)


def _taken(
    model: nn.Module, spec: Spec, capture: str, inplace: bool, call: Call | None
) -> tuple[nn.Module, list[Taken]]:
    if not inplace:
        return taken_over(model)
    # What does not fit shows on a copy, while the model is still as it was.
    copy, taken = taken_over(model)
    prepare(copy, spec, capture, taken=taken, call=call)
    return take_over(model)


def _rewrite(
    target: nn.Module,
    spec: Spec,
    capture: str,
    without: Collection[str],
    taken: Sequence[Taken],
    call: Call | None,
) -> nn.Module:
    prepared = prepare(target, spec, capture, taken=taken, call=call)
    if not prepared.new and not prepared.absorbed:
        return target
    session = attach_sites(prepared)
    fresh = [site for _, site in (*prepared.new, *prepared.absorbed)]
    in_place = prepared.capture.root == "module"
    if in_place:
        target = open_graph_owners(target)
    open_path(target, (name for site in fresh for name in site.record.names), session, itself=in_place)
    if in_place:
        if "hoist" not in without:
            hoist(fresh)
        if "fuse" not in without:
            fuse(fresh)
        return target
    return _rewrite_graph(target, prepared, session, without)


def attach_sites(prepared: Prepared) -> Session:
    """Put the sites that were built into the model's modules; from here on the model is another one."""
    session = prepared.standing[0].session if prepared.standing else Session()
    order = {id(entry): index for index, entry in enumerate(prepared.entries)}
    made = [*((claim.entries, site) for claim, site in prepared.new)]
    shared = shared_storages(entry.tensor for entry in prepared.entries if entry.tensor is not None)
    for entries, site in made:
        _keep_parameters(entries, site, shared)
    made += [([entry], site) for entry, site in prepared.absorbed]
    for entries, site in sorted(made, key=lambda pair: order[id(pair[0][0])]):
        _attach(entries, site, session)
    _connect(prepared)
    return session


def _attach(entries: Sequence[Entry], site: ParametrizedTensor, session: Session) -> None:
    site.__dict__["session"] = session
    places: dict[int, tuple[nn.Module, list[str]]] = {}
    for entry in entries:
        for owner, tensor in entry.owners:
            places.setdefault(id(owner), (owner, []))[1].append(tensor)
    for owner, tensors in places.values():
        groups = [tensors] if len(entries) > 1 else [[tensor] for tensor in tensors]
        for group in groups:
            attach(owner, group, site)


def _keep_parameters(entries: Sequence[Entry], site: ParametrizedTensor, shared: frozenset[int]) -> None:
    """Store the originals in the model's own Parameter objects where the shapes allow it."""
    free = [entry.tensor for entry in entries if isinstance(entry.tensor, nn.Parameter)]
    for name, original in zip(site.original_names, site.originals, strict=True):
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
    sites = [site for _, site in (*prepared.new, *prepared.absorbed, *prepared.present)]
    if isinstance(root, RewrittenModule):
        called = {node.target for node in graph.nodes if node.op == "call_module"}
        sites += [site for site in prepared.standing if site not in sites and site_path(site) in called]
    return Rewriting(
        root=root,
        graph=graph,
        paths={site: site_path(site) for site in sites},
        sites={name: site for site in sites for name in site.record.names},
        session=session,
        order=sites,
    )


def _rewrite_graph(root: nn.Module, prepared: Prepared, session: Session, without: Collection[str]) -> nn.Module:
    for name, tensor in prepared.capture.constants.items():
        root.register_buffer(name, tensor, persistent=False)
    rewriting = rewriting_of(root, prepared, session)
    graph = rewriting.graph
    before = outline(graph)
    optional = [step for name, step in _OPTIONAL.items() if name not in without]
    passes = [expand_pass, open_pass, insert_pass, cache_pass, prune_pass, *optional, verify_against(before)]
    run_passes(rewriting, passes)
    if isinstance(root, RewrittenModule):
        root.graph = graph
        return root
    return RewrittenModule(root, graph)
