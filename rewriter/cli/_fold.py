"""Repeated blocks of a drawn graph, such as the layers of a transformer, shown once."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LONGEST = 100
"""Lines of a block."""
_FEWEST = 3
"""Repetitions from which on a block is folded."""
_NUMBER = re.compile(r"(%\d+|\b\d+(?=(?:\.\d+)*(?:\.[A-Za-z_]|\()))")
"""Numbers of nodes, and indexes in the names of modules and tensors."""

Parts = tuple[tuple[str, ...], tuple[tuple[str, int], ...]]
Steps = tuple[int, ...]


def folded(lines: Sequence[str]) -> list[str]:
    """Return the lines with each run of equal blocks as its first block and one line for the others.

    Blocks are equal if they differ only in the numbers of nodes, and in one step of the indexes in names.

    >>> print(*folded([f"%{n + 1} = relu(%{n})" for n in range(1, 9)]), sep="\\n")
    %2 = relu(%1)
    … 7 more like this line, to %9

    Arguments:
        lines: of `graph_lines`.
    """
    parts = [_parts(line) for line in lines]
    shown: list[str] = []
    start = 0
    while start < len(lines):
        length, count = _best(parts, start)
        shown += map(_shortened, lines[start : start + length])
        if count > 1:
            block = "this line" if length == 1 else f"these {length} lines"
            last = lines[start + length * count - 1].partition(" = ")[0]
            shown.append(f"… {count - 1} more like {block}, to {last}")
        start += length * count
    return shown


def _shortened(line: str) -> str:
    """Return the line of a batch with its first names only."""
    start, batch, names = line.partition("evaluate together ")
    first, rest = names.split(", ")[:4], names.split(", ")[4:]
    return f"{start}{batch}{', '.join(first)} and {len(rest)} more" if batch and rest else line


def _parts(line: str) -> Parts:
    """Return the text of a line between its numbers, and the numbers, each with its kind."""
    pieces = _NUMBER.split(line)
    numbers = tuple(("%" if piece.startswith("%") else ".", int(piece.lstrip("%"))) for piece in pieces[1::2])
    return tuple(pieces[::2]), numbers


def _best(parts: Sequence[Parts], start: int) -> tuple[int, int]:
    """Return the length of the block at `start`, and how often it comes, where that leaves the fewest lines."""
    best, saved = (1, 1), 0
    for length in range(1, min(_LONGEST, (len(parts) - start) // _FEWEST) + 1):
        stop, pattern = start, list[Steps]()
        while stop + length < len(parts):
            steps = _steps(parts[stop], parts[stop + length], length)
            if steps is None or (stop - start >= length and steps != pattern[(stop - start) % length]):
                break
            pattern.append(steps)
            stop += 1
        count = (stop - start) // length + 1
        if count >= _FEWEST and (count - 1) * length > saved:
            best, saved = (length, count), (count - 1) * length
    return best


def _steps(one: Parts, other: Parts, length: int) -> Steps | None:
    """Return how far the numbers of a line are from those `length` lines later, None if that is no repetition."""
    if one[0] != other[0]:
        return None
    steps = tuple(after - before for (_, before), (_, after) in zip(one[1], other[1], strict=True))
    kinds = (kind for kind, _ in one[1])
    allowed = (step == 0 or step == (length if kind == "%" else 1) for kind, step in zip(kinds, steps, strict=True))
    return steps if all(allowed) else None
