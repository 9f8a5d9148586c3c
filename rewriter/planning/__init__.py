"""From a spec and a model to a plan, without touching either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from rewriter._given import check_model
from rewriter._pause import collector_paused
from rewriter.capture import call_for
from rewriter.context._random import nothing_drawn
from rewriter.language import Spec, load_spec
from rewriter.planning._plan import Plan, Site
from rewriter.planning._prepare import Prepared, plan_of, prepare
from rewriter.planning._survey import Entry, dtype_name, refuse_strays, survey

__all__ = ["Entry", "Plan", "Prepared", "Site", "dtype_name", "plan", "plan_of", "prepare", "refuse_strays", "survey"]


def plan(
    model: nn.Module | ExportedProgram,
    spec: Any,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    capture: str = "auto",
) -> Plan:
    """Say what `rewrite` would do: which rule owns which tensors, how they are reached, how far they move.

    >>> import torch, rewriter
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    >>> spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
    >>> rewriter.plan(model, spec).sites[0].name
    '0.weight'

    Neither the model nor the state of the random number generators changes.

    Arguments:
        model: any module, or an ExportedProgram.
        spec: a `Spec`, or anything `load_spec` takes.
        example_inputs, example_kwargs, dynamic_shapes, capture: as for `rewrite`.

    Raises:
        SpecError: the spec cannot be read.
        PlanError: the spec does not fit the model; every reason is listed.
        CaptureError: the capture asked for is not possible.
    """
    from rewriter.absorbing import taken_over

    read = spec if isinstance(spec, Spec) else load_spec(spec)
    check_model(model, "plan")
    call = call_for(model, capture, example_inputs, example_kwargs, dynamic_shapes)
    if isinstance(model, ExportedProgram):
        from rewriter.program import plan_program

        return plan_program(model, read)
    with collector_paused(), nothing_drawn((*model.parameters(), *model.buffers())):
        model, taken = taken_over(model) if read.absorb else (model, [])
        return plan_of(model, prepare(model, read, capture, measure=True, taken=taken, call=call))
