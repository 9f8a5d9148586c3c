"""From the captured graph to the graph that runs: lowering, and the optional passes after it.

An optional pass changes how fast a model runs, and not what it computes. Each one is a file: delete it and its line in
`OPTIONAL`, and all else works.
"""

from __future__ import annotations

from rewriter.passes._infra import Lowering, Pass, PassError, few_of_each, run_passes
from rewriter.passes._lower import inlined_leaf, lower
from rewriter.passes._print import print_graph
from rewriter.passes._unfold import scriptable, unfolded
from rewriter.passes.optional._apart import apart_pass
from rewriter.passes.optional._batch import batch_pass, groups_to_batch, why_alone, why_not_equal
from rewriter.passes.optional._cast import cast_pass
from rewriter.passes.optional._fuse import fuse, fuse_pass, why_not_fused
from rewriter.passes.optional._hoist import hoist, hoist_pass, why_not_hoisted
from rewriter.passes.optional._rows import rows_pass
from rewriter.passes.optional._transpose import transpose_pass

OPTIONAL = (hoist_pass, fuse_pass, rows_pass, apart_pass, cast_pass, batch_pass, transpose_pass)

__all__ = [
    "OPTIONAL",
    "Lowering",
    "Pass",
    "PassError",
    "few_of_each",
    "fuse",
    "groups_to_batch",
    "hoist",
    "inlined_leaf",
    "lower",
    "print_graph",
    "run_passes",
    "scriptable",
    "unfolded",
    "why_alone",
    "why_not_equal",
    "why_not_fused",
    "why_not_hoisted",
]
