"""Tables and counts as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rewriter.errors import printable

if TYPE_CHECKING:
    from rich.table import Table


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table without borders; control characters in names are escaped."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in head:
        made.add_column(title, overflow="fold")  # a name is never cut
    for row in rows:
        made.add_row(*map(printable, row))
    return made


def counted(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> counted(1, "tensor"), counted(3, "tensor")
    ('1 tensor', '3 tensors')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape for people.

    >>> shape_text([3, 4]), shape_text([])
    ('3×4', 'scalar')
    """
    return "×".join(map(str, shape)) or "scalar"
