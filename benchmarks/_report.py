"""Measurements and their targets, as data and as the tables in the docs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks._measure import Spread, Timings


@dataclass(frozen=True)
class Bound:
    """The target of a ratio; either end may be open.

    Arguments:
        low: the ratio is at least this.
        high: the ratio is at most this.
    """

    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} … {self.high:g}"
        return f"≥ {self.low:g}" if self.low is not None else f"≤ {self.high:g}"

    def __contains__(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def cuts(self, interval: tuple[float, float]) -> bool:
        """Whether an end of the bound lies within an interval."""
        return any(end is not None and interval[0] < end < interval[1] for end in (self.low, self.high))


@dataclass(frozen=True)
class Row:
    """One claim, measured.

    Arguments:
        name: of the work.
        what: the kind of ratio: ``"speed"`` (how many times faster than `against`), ``"time"`` or ``"memory"``
            (how many times as much as `against`), or ``"slope"``.
        against: the contender to compare with.
        bound: the target; ``None`` for a ratio without one.
        measured: the ratio.
        also: a further condition, and whether it is true.
    """

    name: str
    what: str
    against: str
    bound: Bound | None
    measured: Spread
    also: tuple[str, bool] | None = None

    @property
    def verdict(self) -> str:
        """Return ``"holds"`` if the target is met, ``"fails"`` if it is missed, ``""`` without a target.

        ``"even"``: the target is inside the 95 % confidence interval of the median.
        """
        if self.bound is None:
            return ""
        if self.also is not None and not self.also[1]:
            return "fails"
        if self.bound.cuts(self.measured.sure):
            return "even"
        return "holds" if self.measured.median in self.bound else "fails"

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON data."""
        return {
            "name": self.name,
            "what": self.what,
            "against": self.against,
            "required": str(self.bound) if self.bound else None,
            "measured": asdict(self.measured),
            "also": None if self.also is None else {"condition": self.also[0], "holds": self.also[1]},
            "verdict": self.verdict,
        }


@dataclass
class Group:
    """The rows of one benchmark, with the times they come from.

    Arguments:
        title: a heading.
        about: what runs, in a sentence or two.
        rows: the claims.
        times: work → contender → seconds per call.
    """

    title: str
    about: str
    rows: list[Row] = field(default_factory=list)
    times: dict[str, dict[str, Spread]] = field(default_factory=dict)

    def add_times(self, work: str, timings: Timings) -> None:
        """Add the times of all contenders of one work."""
        self.times[work] = {name: timings.seconds(name) for name in timings.samples}

    def faster(self, work: str, timings: Timings, who: str, against: str, low: float | None) -> None:
        """Add a row: `who` is at least `low` times faster than `against`."""
        bound = None if low is None else Bound(low=low)
        self.rows.append(Row(f"{work}: {who}", "speed", against, bound, timings.ratio(against, who)))

    def costs(self, work: str, timings: Timings, who: str, against: str, high: float | None) -> None:
        """Add a row: `who` takes at most `high` times as long as `against`."""
        bound = None if high is None else Bound(high=high)
        self.rows.append(Row(f"{work}: {who}", "time", against, bound, timings.ratio(who, against)))

    def to_dict(self) -> dict[str, Any]:
        """Return the group as JSON data."""
        times = {work: {name: asdict(spread) for name, spread in of.items()} for work, of in self.times.items()}
        return {
            "title": self.title,
            "about": self.about,
            "rows": [row.to_dict() for row in self.rows],
            "seconds": times,
        }


def environment(device: str) -> dict[str, Any]:
    """Return the processor and the versions that the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def to_markdown(
    environments: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Iterable[Group]], summary: str
) -> str:
    """Return the page of the docs: the summary of the first setting, then every group of every setting."""
    lines = [_TITLE, summary, _PREFACE]
    for label, found in groups.items():
        facts = ", ".join(f"{key} {value}" for key, value in environments[label].items())
        lines += [f"## On {label}\n", f"{facts}.\n"]
        for group in found:
            lines += [f"### {group.title}\n", f"{group.about}\n", _rows_table(group), _times_table(group)]
    return "\n".join(lines).rstrip() + "\n"


_TITLE = """# Benchmarks

Written by `python benchmarks/run.py`; the numbers behind it are in `benchmarks/report.json`.
"""

_PREFACE = """## How this is measured

All contenders of a table run in one process, in rounds. In each round every contender runs once, in random order.
A ratio is taken within a round; the table shows the median over the rounds and the quartiles. *Speed* says how many
times faster, *time* and *memory* say how many times as much. A training step is forward and backward.
✓ target met, ✗ target missed, ≈ target inside the 95 % confidence interval of the median.

A full run measures with one thread and with one thread per core; the sections below say what was measured. A second
thread helps small matrices little. It helps torch's matrix exponential much, since that works on a matrix of twice the
size. glibc is set to reuse freed memory: returning it to the system makes steps up to 1.5 times as long, by chance.
"""


_MARKS = {"holds": "✓", "fails": "✗", "even": "≈", "": ""}


def _rows_table(group: Group) -> str:
    lines = ["| work | ratio | against | target | measured | |", "|---|---|---|---|---|---|"]
    for row in group.rows:
        ratio = f"**{row.measured.median:.3g}** ({row.measured.low:.3g} – {row.measured.high:.3g})"
        if row.also is not None:
            ratio += f", {row.also[0]}: {'yes' if row.also[1] else 'no'}"
        mark = _MARKS[row.verdict]
        lines.append(f"| {row.name} | {row.what} | {row.against} | {row.bound or ''} | {ratio} | {mark} |")
    return "\n".join(lines) + "\n"


def _times_table(group: Group) -> str:
    if not group.times:
        return ""
    lines = ["| milliseconds | median | quartiles |", "|---|---|---|"]
    for work, found in group.times.items():
        for name, spread in found.items():
            low, high = (f"{1e3 * value:.3g}" for value in (spread.low, spread.high))
            lines.append(f"| {work}: {name} | {1e3 * spread.median:.3g} | {low} – {high} |")
    return "\n".join(lines) + "\n"
