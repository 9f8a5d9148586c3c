"""The passes over a captured graph, one per file, and the order in which they run."""

from __future__ import annotations

from rewriter.passes._batch import batch_pass, groups_to_batch, why_alone, why_not_equal
from rewriter.passes._cache import cache_pass
from rewriter.passes._cast import cast_pass
from rewriter.passes._expand import expand_pass
from rewriter.passes._fuse import fuse, fuse_pass, why_not_fused
from rewriter.passes._hoist import hoist, hoist_pass, why_not_hoisted
from rewriter.passes._infra import META, Pass, PassError, Rewriting, note, run_passes
from rewriter.passes._insert import insert_pass
from rewriter.passes._open import open_pass
from rewriter.passes._print import print_graph
from rewriter.passes._prune import prune_pass
from rewriter.passes._restore import restore_pass
from rewriter.passes._rows import rows_pass
from rewriter.passes._samples import few_of_each
from rewriter.passes._start import keeps_values, start_of_graph
from rewriter.passes._transpose import transpose_pass
from rewriter.passes._unfold import scriptable, unfolded
from rewriter.passes._verify import outline, verify_against

__all__ = [
    "META",
    "Pass",
    "PassError",
    "Rewriting",
    "batch_pass",
    "cache_pass",
    "cast_pass",
    "expand_pass",
    "few_of_each",
    "fuse",
    "fuse_pass",
    "groups_to_batch",
    "hoist",
    "hoist_pass",
    "insert_pass",
    "keeps_values",
    "note",
    "open_pass",
    "outline",
    "print_graph",
    "prune_pass",
    "restore_pass",
    "rows_pass",
    "run_passes",
    "scriptable",
    "start_of_graph",
    "transpose_pass",
    "unfolded",
    "verify_against",
    "why_alone",
    "why_not_equal",
    "why_not_fused",
    "why_not_hoisted",
]
