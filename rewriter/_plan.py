"""plan: decide everything about a rewriting before the model is touched."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rewriter._copy import copied
from rewriter._given import check_model
from rewriter.absorbing import absorbable, absorbed_sites, foreign_entries, holders_of, take_over
from rewriter.capture import Call, call_for
from rewriter.context._random import nothing_drawn
from rewriter.language import Spec, load_spec
from rewriter.planning import ModuleTable, Origin, Plan, make_plan
from rewriter.program import plan_program


@torch.inference_mode(False)
def plan(
    model: nn.Module | ExportedProgram,
    spec: Any,
    *,
    example_inputs: Tensor | Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    capture: str = "auto",
    without: Collection[str] = (),
) -> Plan:
    """Return what `rewrite` will do: which rule owns which tensors, how they are reached, how far they move.

    >>> import torch, rewriter
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    >>> spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
    >>> plan = rewriter.plan(model, spec)
    >>> plan.sites[0].name
    '0.weight'
    >>> type(rewriter.rewrite(model, plan)[0]).__name__
    'Linear'

    Neither the model nor the state of the random number generators changes.

    Arguments:
        model: any module, or an ExportedProgram.
        spec: a `Spec`, or anything `load_spec` takes.
        example_inputs: as for `rewrite`, like the arguments below.
        example_kwargs: keyword arguments of the call.
        dynamic_shapes: which sizes vary, for ``capture="export"``.
        capture: how the uses of tensors are found.
        without: passes to leave out.

    Raises:
        SpecError: the spec cannot be read.
        PlanError: the spec does not fit the model; every reason is listed.
        CaptureError: the capture asked for is not possible.
    """
    check_model(model, "plan")
    read = spec if isinstance(spec, Spec) else load_spec(spec)
    call = call_for(model, capture, example_inputs, example_kwargs, dynamic_shapes)
    origin = Origin(model, capture, call, tuple(without))
    if isinstance(model, ExportedProgram):
        return plan_program(model, read, origin)
    with collector_paused(), nothing_drawn((*model.parameters(), *model.buffers())):
        target = copied(model) if absorbable(model, read, holders_of(model)) else model
        made = plan_module(target, read, capture, call, without, origin)
    _ = made.sites, made.frozen, made.added  # while the model is as it was planned
    return made


def plan_module(
    model: nn.Module,
    spec: Spec,
    mode: str,
    call: Call | None,
    without: Collection[str] = (),
    origin: Origin | None = None,
) -> Plan:
    """Plan a module. What other tools did to it is absorbed in place, as far as the spec asks for it.

    Arguments:
        model: the model; it changes if something is absorbed.
        spec: the rules.
        mode: how to capture the model.
        call: example inputs.
        without: passes that will be left out.
        origin: of the plan of a user, which also says how far each value moves.
    """
    found = holders_of(model)
    if found:
        model, taken = take_over(model, absorbable(model, spec, found))
        table = ModuleTable(model, mode, call, foreign_entries(model, holders_of(model)))
        table.absorbed = absorbed_sites(taken, table.entries)
    else:
        table = ModuleTable(model, mode, call)
    return make_plan(table, spec, measure=origin is not None, without=without, origin=origin)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the collector from walking a growing model again and again: half of the time for 10,000 layers.

    What was made meanwhile goes to the oldest generation, where it would end up: enabling the collector would
    otherwise walk all of it at once.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()
