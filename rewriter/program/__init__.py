"""ExportedProgram in, ExportedProgram out: chains become nodes of the program's own graph."""

from __future__ import annotations

from rewriter.program._bake import bake_program
from rewriter.program._insert import tied
from rewriter.program._recognise import sites_of_program
from rewriter.program._rewrite import plan_program, rewrite_program
from rewriter.program._table import ProgramTable, entries_of

__all__ = [
    "ProgramTable",
    "bake_program",
    "entries_of",
    "plan_program",
    "rewrite_program",
    "sites_of_program",
    "tied",
]
