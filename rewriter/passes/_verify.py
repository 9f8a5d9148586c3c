"""verify: the graph is well formed, and nothing but the planned uses was touched."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx

from rewriter.passes._infra import Pass, PassError, Rewriting, note, reads_of
from rewriter.passes._rows import calls_of_rows
from rewriter.passes._transpose import as_written
from rewriter.runtime._rows import ROW


def outline(graph: fx.Graph) -> Counter[tuple[str, Any]]:
    """Count what the graph does: operations and targets, opened and expanded calls as the calls they were."""
    found: Counter[tuple[str, Any]] = Counter()
    for node in graph.nodes:
        entry = note(node)
        if "part" in entry:
            continue
        if "opened" in entry:
            found["call_module", entry["opened"]] += 1
        elif node.op != "get_attr" and not entry.keys() & {"site", "member", "transposed", "rows", ROW}:
            found[node.op, as_written(node.target)] += 1
    found.update(calls_of_rows(graph))
    return found


def verify_against(before: Counter[tuple[str, Any]]) -> Pass:
    """Return the last pass: it changes nothing, and fails unless the graph does what `before` says it did."""

    def check(rewriting: Rewriting) -> None:
        rewriting.graph.lint()
        after = outline(rewriting.graph)
        if after != before:
            lost, gained = list((before - after).elements()), list((after - before).elements())
            raise PassError(f"the graph lost {lost} and gained {gained}")
        if reads_of(rewriting):
            raise PassError("a selected tensor is still read from its old place")

    return Pass("verify", lambda rewriting: False, ensures=check)
