"""The demo's result as one table."""

from __future__ import annotations

from rich.table import Table

from rewriter.demo._run import Report


def table_of(report: Report) -> Table:
    """Return `report` as a table with a column for each variant of the network."""
    table = Table(title=f"handwritten digits, pixel by pixel: {report.steps} training steps each")
    table.add_column("")
    for name in ("reparam", "no spec", "torch parametrize"):
        table.add_column(name, justify="right")
    table.add_row("test accuracy", f"{report.accuracy:.1%}", f"{report.accuracy_plain:.1%}", "")
    table.add_row("largest ‖WᵀW − I‖", f"{report.orthogonality:.1e}", f"{report.orthogonality_plain:.1e}", "")
    table.add_row("evaluations per forward", str(report.evaluations), "", str(report.evaluations_torch))
    table.add_row(
        "ms per forward and backward",
        *(
            f"{1000 * seconds:.1f}"
            for seconds in (report.step_seconds, report.step_seconds_plain, report.step_seconds_torch)
        ),
    )
    table.add_row("seconds of training", f"{report.training_seconds:.1f}", f"{report.training_seconds_plain:.1f}", "")
    table.add_row("largest logit difference, baked", f"{report.difference_baked:.1e}", "", "")
    table.add_row("largest logit difference, scripted", f"{report.difference_scripted:.1e}", "", "")
    return table
