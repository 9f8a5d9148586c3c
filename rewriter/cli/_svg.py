"""A graph as SVG: one line for each node, and an arc from each node to its uses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.sax.saxutils import escape

_ROW, _TOP, _CHARACTER = 20, 14, 7.3
_WIDEST = 160
_MOST = 400
"""How many lines a drawing has."""


def svg_of(lines: Sequence[str]) -> str:
    """Return the lines of `graph_lines` as an SVG image; the numbers ``%n`` say what is used where.

    >>> svg_of(["%1 = input", "%2 = relu(%1)", "return %2"]).count("<path")
    2

    Arguments:
        lines: the graph.
    """
    shown = [line if len(line) <= _WIDEST else line[: _WIDEST - 1] + "…" for line in lines[:_MOST]]
    if len(lines) > _MOST:
        shown.append(f"… and {len(lines) - _MOST} more lines")
    made = {number: row for row, line in enumerate(shown) if (number := line.partition(" = ")[0]).startswith("%")}
    arcs = [
        (made[number], row)
        for row, line in enumerate(shown)
        for number in dict.fromkeys(re.findall(r"%\d+", line.partition(" = ")[2] or line))
        if number in made and made[number] < row
    ]
    left = 24 + 8 * min(12, max((stop - start for start, stop in arcs), default=0))
    width = left + 20 + _CHARACTER * max(map(len, shown), default=0)
    height = _TOP + _ROW * len(shown)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="graph" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}" role="img" aria-label="The graph of the model">',
        "<style>.graph text{font:12px ui-monospace,monospace;fill:#1c2430}.graph path{fill:none;stroke:#8a94a3}"
        ".graph circle{fill:#8a94a3}.graph .chain{fill:#7a3ff2;font-weight:bold}.graph circle.chain{fill:#7a3ff2}"
        "@media(prefers-color-scheme:dark){.graph text{fill:#e6e9ee}.graph .chain{fill:#b79bff}}</style>",
    ]
    for start, stop in arcs:
        bend = left - 8 - 8 * min(12, stop - start)
        y, end = _TOP + _ROW * start, _TOP + _ROW * stop
        parts.append(f'<path d="M{left} {y}C{bend} {y} {bend} {end} {left} {end}"/>')
    for row, line in enumerate(shown):
        y, mark = _TOP + _ROW * row, ' class="chain"' if " >> " in line or "evaluate " in line else ""
        parts.append(f'<circle{mark} cx="{left}" cy="{y}" r="3"/>')
        parts.append(f'<text{mark} x="{left + 10}" y="{y + 4}" xml:space="preserve">{escape(line)}</text>')
    return "".join([*parts, "</svg>"])
