"""The table of README that also opens the page of benchmarks: ten lines of the many, in milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LINES = {
    ("Unrolled RNN", "householder"): ("RNN, 100 steps, orthogonal kernel (`householder`)", "graph"),
    ("Unrolled RNN", "cayley"): ("the same, `cayley`", "graph"),
    ("Ordinary", "MLP d=256, spectral_norm"): ("12 linear layers of width 256, spectral norm", "ours"),
    ("Ordinary", "MLP d=256, weight_norm"): ("the same, weight norm", "ours"),
    ("Ordinary", "MLP d=256, householder"): ("the same, orthogonal (`householder`)", "ours"),
    ("Ordinary", "critic b=16, spectral_norm"): ("critic of a GAN, spectral norm", "ours"),
    ("Ordinary", "vocoder c=128, weight_norm"): ("vocoder, 76 convolutions, weight norm", "ours"),
    ("Ordinary", "TCN c=64, weight_norm"): ("TCN, 16 convolutions, weight norm", "ours"),
    ("Ordinary", "transformer d=256, lora"): ("transformer, 4 blocks, LoRA", "ours"),
    ("Inference", "RNN"): ("RNN, forward without gradients, `cache: version`", "version"),
}
"""(start of the group's title, work) → the line in words, and the contender that is ours."""

COLUMNS = {"plain weights": "plain", "by hand": "by hand", "torch": "torch uncached", "torch, cached": "torch cached"}
START, END = "<!-- benchmarks: start -->\n", "<!-- benchmarks: end -->\n"


def summary(groups: Iterable[Mapping[str, Any]]) -> str:
    """Return the table, without the lines that were not measured.

    Arguments:
        groups: as benchmarks/report.json has them.
    """
    found = list(groups)
    rows = [
        _row(words, ours, group["seconds"][work])
        for (title, work), (words, ours) in LINES.items()
        for group in found
        if group["title"].startswith(title) and work in group["seconds"]
    ]
    head = ["one training step, in milliseconds", "**reparam**", *COLUMNS]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]) + "\n" if rows else ""


def _row(words: str, ours: str, seconds: Mapping[str, Mapping[str, float]]) -> str:
    times = [seconds[name]["median"] if name in seconds else None for name in (ours, *COLUMNS.values())]
    shown = ["–" if time is None else f"{1e3 * time:{'.0f' if time >= 1 else '.3g'}}" for time in times]
    return f"| {words} | **{shown[0]}** | {' | '.join(shown[1:])} |"


def write_readme(path: Path, report: Mapping[str, Any]) -> None:
    """Replace the table between the markers by that of the first setting of the report."""
    before, _, rest = path.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    path.write_text(before + START + readme_table(report) + END + after, encoding="utf-8")


def readme_table(report: Mapping[str, Any]) -> str:
    """Return what README has between the markers."""
    label = next(iter(report["benchmarks"]))
    machine = report["environment"][label]
    where = f"{label}, {machine['device']}, torch {machine['torch']}"
    return f"{summary(report['benchmarks'][label])}\nMeasured on {where}.\n"
