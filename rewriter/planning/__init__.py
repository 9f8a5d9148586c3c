"""From a spec and a model to a plan; the model is only read."""

from __future__ import annotations

from rewriter.planning._gates import gates_hint
from rewriter.planning._module_table import ModuleTable
from rewriter.planning._origin import Origin
from rewriter.planning._plan import Plan, PlannedSite
from rewriter.planning._prepare import make_plan, prepare
from rewriter.planning._resolve import resolve
from rewriter.planning._survey import Entry, dtype_name, refuse_strays, survey

__all__ = [
    "Entry",
    "ModuleTable",
    "Origin",
    "Plan",
    "PlannedSite",
    "dtype_name",
    "gates_hint",
    "make_plan",
    "prepare",
    "refuse_strays",
    "resolve",
    "survey",
]
