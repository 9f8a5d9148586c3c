"""The result of the demo as one table."""

from __future__ import annotations

from rich.table import Table

from rewriter.demo._run import Report


def table_of(report: Report) -> Table:
    """Return `report` as a table with one column for each variant of the network."""
    table = Table(title=f"handwritten digits, pixel by pixel: {report.steps} training steps each")
    table.add_column("")
    for name in ("reparam", "no spec", "torch, cached()", "torch, uncached"):
        table.add_column(name, justify="right")
    same = "as cached"  # The cache changes the time and not the result.
    accuracies = (report.accuracy, report.accuracy_plain, report.accuracy_cached)
    table.add_row("test accuracy", *(f"{share:.1%}" for share in accuracies), same)
    distances = (report.orthogonality, report.orthogonality_plain, report.orthogonality_cached)
    table.add_row("largest ‖WᵀW − I‖", *(f"{distance:.1e}" for distance in distances), same)
    counts = (str(report.evaluations), "", str(report.evaluations_cached), str(report.evaluations_torch))
    table.add_row("evaluations per forward", *counts)
    steps = (report.step_seconds, report.step_seconds_plain, report.step_seconds_cached, report.step_seconds_torch)
    table.add_row("ms per forward and backward", *(f"{1000 * seconds:.1f}" for seconds in steps))
    seconds_each = (report.training_seconds, report.training_seconds_plain, report.training_seconds_cached)
    table.add_row("seconds of training", *(f"{seconds:.1f}" for seconds in seconds_each), "")
    table.add_row("largest logit difference, baked", f"{report.difference_baked:.1e}", "", "", "")
    table.add_row("largest logit difference, scripted", f"{report.difference_scripted:.1e}", "", "", "")
    return table
