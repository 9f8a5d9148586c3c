"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text with aligned columns.

    >>> print(columns(("name", "size"), [("weight", "3×4")]))
    name    size
    weight  3×4
    """
    every = [head, *rows]
    widths = [max(len(row[index]) for row in every) for index in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in every)


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as people write it.

    >>> shape_text([3, 4]), shape_text([])
    ('3×4', 'scalar')
    """
    return "×".join(map(str, shape)) or "scalar"
