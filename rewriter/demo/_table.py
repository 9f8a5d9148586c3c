"""The result of the demo as one table."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from rewriter.demo._run import Report


def table_of(report: Report) -> Table:
    """Return `report` as a table with one column for each variant of the network."""
    table = Table(title=f"handwritten digits, pixel by pixel: {report.steps} training steps each")
    table.add_column("")
    for name in ("reparam", "no spec", "torch, cached()", "torch, uncached"):
        table.add_column(name, justify="right")
    variants = (report.rewritten, report.plain, report.cached, report.torch)

    def row(name: str, values: Iterable[float | None], form: str, missing: str = "") -> None:
        table.add_row(name, *(missing if value is None else form.format(value) for value in values))

    row("test accuracy", (one.accuracy for one in variants), "{:.1%}", "as cached")
    row("largest ‖WᵀW − I‖", (one.orthogonality for one in variants), "{:.1e}", "as cached")
    row("evaluations per forward", (one.evaluations for one in variants), "{}")
    row("ms per forward and backward", (1000 * (one.step_seconds or 0) for one in variants), "{:.1f}")
    row("seconds of training", (one.training_seconds for one in variants), "{:.1f}")
    row("largest logit difference, baked", [report.difference_baked], "{:.1e}")
    row("largest logit difference, scripted", [report.difference_scripted], "{:.1e}")
    return table
