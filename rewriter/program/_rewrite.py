"""plan and rewrite for ExportedPrograms."""

from __future__ import annotations

import contextlib

from torch.export import ExportedProgram

from rewriter._attach import keep_parameters
from rewriter.context._random import nothing_drawn
from rewriter.errors import PlanError
from rewriter.language import Spec
from rewriter.planning import Origin, Plan, make_plan
from rewriter.program._insert import Edited, insert_site
from rewriter.program._skeleton import is_training
from rewriter.program._table import ProgramTable, values_of
from rewriter.sites import site_path


def plan_program(program: ExportedProgram, spec: Spec, origin: Origin | None = None) -> Plan:
    """Plan a program; it is only read."""
    if spec.absorb:
        raise PlanError("an ExportedProgram has nothing to absorb; absorb the model before it is exported")
    if spec.trainable != "as_is":
        raise PlanError(
            f"`trainable: {spec.trainable}` needs a module: freeze parameters of the model before it is exported"
        )
    table = ProgramTable(program)
    with nothing_drawn() if origin is not None else contextlib.nullcontext():
        return make_plan(table, spec, measure=origin is not None, origin=origin)


def rewrite_program(program: ExportedProgram, spec: Spec | Plan, *, inplace: bool = False) -> ExportedProgram:
    """Return a program in which the selected tensors are computed; see `rewriter.rewrite`.

    Raises:
        PlanError: the spec does not fit the program.
        CaptureError: a chain cannot be exported.
    """
    plan = _valid(program, spec)
    edited = Edited(program, share=inplace)
    if not plan.new:
        return program if inplace else edited.finish()
    if not inplace:
        plan = edited.copied(plan)
    tensors = [entry.tensor for claim, _ in plan.new for entry in claim.entries if entry.tensor is not None]
    before = [(tensor, tensor.data, tensor.data.clone(), tensor.requires_grad) for tensor in tensors if inplace]
    keep_parameters(plan)
    try:
        for _, site in reversed(plan.new):  # a site comes after those that it reads
            with nothing_drawn(tensors):
                insert_site(edited, site, site_path(site), values_of(edited), is_training(program))
    except BaseException:
        for tensor, data, content, trained in before:
            tensor.data, tensor.requires_grad = data.copy_(content), trained
        raise
    return edited.finish()


def _valid(program: ExportedProgram, spec: Spec | Plan) -> Plan:
    if isinstance(spec, Spec):
        return plan_program(program, spec)
    assert spec.origin is not None
    change = spec.origin.change(program)
    if not change:
        return spec
    again = plan_program(program, spec.spec)
    again.require_same(spec, change)
    return again
