"""prune: reads that nothing uses any more go; where they stood is noted for the way back."""

from __future__ import annotations

from typing import Any

from torch import fx

from rewriter.passes._infra import META, Pass, PassError, Rewriting, evaluations_of, note, reads_of


def prune_reads(rewriting: Rewriting) -> bool:
    """Erase the dead reads of selected tensors."""
    evaluations = evaluations_of(rewriting)
    dead = reads_of(rewriting)
    for rank, read in enumerate(dead):
        nodes = evaluations[rewriting.sites[str(read.target)]]
        if nodes and not note(read).get("synthetic"):
            nodes[0].meta[META].setdefault("reads", []).append(_whereabouts(read, rank))
    for read in dead:
        rewriting.graph.erase_node(read)
    return bool(dead)


def _whereabouts(read: fx.Node, rank: int) -> dict[str, Any]:
    after = read.next
    while note(after).keys() & {"site", "member", "synthetic", "users"} and after.op != "output":
        after = after.next
    return {
        "rank": rank,
        "name": read.name,
        "target": read.target,
        "before": after.name,
        "users": note(read).get("users", []),
    }


def _no_reads(rewriting: Rewriting) -> None:
    left = reads_of(rewriting)
    if left:
        raise PassError(f"{left[0].target} is still read")


prune_pass = Pass("prune", prune_reads, ensures=_no_reads)
