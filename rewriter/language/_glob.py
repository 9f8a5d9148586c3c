"""Dotted globs such as ``blocks.*.attn.{q,k,v}.weight``, translated to regular expressions."""

from __future__ import annotations

import functools
import re

LONGEST = 1000
MOST_CHOICES = 32
"""Wildcards and braces of one pattern; the search may come back to each of them."""

_TOKEN = re.compile(r"\*\*\.|\*\*|\*| *, *| *\}|\{ *|.", re.DOTALL)
_WILDCARDS = {"*": "[^.]*", "**": ".*", "**.": r".*\."}


class GlobError(ValueError):
    """A glob that cannot be read."""


class Glob:
    """A dotted glob; `matches` is always about the full name.

    >>> Glob("blocks.*.{q,k}.weight").matches("blocks.11.q.weight")
    True
    >>> Glob("rnn.**.weight_hh*").matches("rnn.weight_hh_l0")
    True

    ``*`` stays inside one segment and may be empty, ``**`` spans segments, ``{a,b}`` alternates and nests.
    At the start of a segment ``**.`` also stands for no segment at all. Everything else is literal, ``[0-9]``
    and ``?`` too. Spaces around an alternative do not count.

    Raises:
        GlobError: braces do not match, a segment is empty, or the pattern is empty or too long.
    """

    def __init__(self, pattern: str) -> None:
        self._fullmatch = compiled(pattern).fullmatch

    def matches(self, name: str) -> bool:
        return self._fullmatch(name) is not None


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """Return the regular expression that fully matches what the glob `pattern` matches.

    >>> compiled("**.{q, k}*").pattern
    '(?:.*\\\\.)?(?:q|k)[^.]*'

    Raises:
        GlobError: see `Glob`.
    """
    if not pattern:
        raise GlobError("an empty pattern matches nothing")
    if len(pattern) > LONGEST:
        raise GlobError(f"a pattern of {len(pattern)} characters; at most {LONGEST} are read")
    if pattern.startswith(".") or pattern.endswith(".") or ".." in pattern:
        raise GlobError("an empty segment: a dot at the start, at the end or after another dot")
    choices = len(re.findall(r"\*+|\{", pattern))
    if choices > MOST_CHOICES:
        raise GlobError(f"a pattern with {choices} wildcards and braces; at most {MOST_CHOICES} are read")
    return re.compile(_translated(pattern), re.DOTALL)


def _translated(pattern: str) -> str:
    expression = ""
    opened: list[tuple[int, bool]] = []
    """The character after each open brace, and whether the brace starts a segment."""
    starts = True
    for token in _TOKEN.finditer(pattern):
        sign = token[0].strip(" ")
        if sign == "{":
            opened.append((token.start() + 1, starts))
            expression += "(?:"
        elif sign == "}":
            if not opened:
                raise GlobError(f"'}}' without '{{' at character {token.end()}")
            opened.pop()
            expression, starts = expression + ")", False
        elif sign == "," and opened:
            expression, starts = expression + "|", opened[-1][1]
        elif sign == "**." and starts:
            expression += r"(?:.*\.)?"
        else:
            expression += _WILDCARDS.get(sign) or re.escape(token[0])
            starts = sign.endswith(".")
    if opened:
        raise GlobError(f"'{{' at character {opened[-1][0]} is never closed")
    return expression
