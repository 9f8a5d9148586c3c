"""The table that opens the page: ten lines of the many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks._report import Group, Row

STEP = "one training step"
LINES = {
    ("Unrolled RNN", "householder: graph", "plain"): f"RNN, 100 steps, orthogonal recurrent weight: {STEP}",
    ("Unrolled RNN", "householder: graph", "torch cached"): "the same",
    ("nn.LSTM", "weight_norm: graph", "torch cached"): f"nn.LSTM, weight norm: {STEP}",
    ("Ordinary", "MLP d=256, spectral_norm: ours", "plain"): f"6 residual blocks of width 256, spectral norm: {STEP}",
    ("Ordinary", "MLP d=256, householder: ours", "torch uncached"): f"the same blocks, orthogonal: {STEP}",
    ("Ordinary", "critic b=16, spectral_norm: ours", "plain"): f"critic of a GAN, spectral norm: {STEP}",
    ("Ordinary", "vocoder c=128, weight_norm: ours", "plain"): f"vocoder, 76 convolutions, weight norm: {STEP}",
    ("Ordinary", "critic b=16, spectral_norm, inference: version", "plain"): "the critic, inference",
    ("8 micro-batches", "matrix_exp: evaluate_once", "torch uncached"): "8 micro-batches, orthogonal weight",
    ("Rewriting", "10,000 layers: rewrite inplace", "symbolic_trace"): "rewriting a model of 10,000 layers",
}
"""(start of the group's title, row, contender to compare with) → the line, in words."""

_AGAINST = {"plain": "plain weights", "symbolic_trace": "`torch.fx.symbolic_trace`"}


def summary(groups: Iterable[Group]) -> str:
    """Return the table, without the lines that the groups do not measure."""
    found = [line for group in groups for row in group.rows for line in _lines(group, row)]
    return "\n".join(["| work | result | against |", "|---|---|---|", *found]) + "\n" if found else ""


def _lines(group: Group, row: Row) -> Iterator[str]:
    for (title, name, against), words in LINES.items():
        if group.title.startswith(title) and (row.name, row.against) == (name, against):
            times = "× as fast" if row.what == "speed" else "× the time"
            yield f"| {words} | **{row.measured.median:.3g}**{times} | {_AGAINST.get(against, against)} |"
