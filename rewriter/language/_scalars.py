"""Unquoted scalars by the core schema of YAML 1.2: ``1e-3`` is a number, ``on`` and ``1:30`` are text."""

from __future__ import annotations

import math
import re
from typing import Any

_LARGEST_INTEGER = 2**63 - 1
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_WORDS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


def read_scalar(text: str) -> tuple[Any, str]:
    """Return the value of an unquoted scalar, and what is wrong with it (empty: nothing).

    >>> read_scalar("1e-3"), read_scalar("on"), read_scalar("010")[1]
    ((0.001, ''), ('on', ''), '010 is octal to some readers; write 10 or quote it')
    """
    if text in _WORDS:
        return _WORDS[text], ""
    if _LEADING_ZERO.fullmatch(text):
        digits = text.lstrip("+-0") or "0"
        return 0, f"{shortened(text)} is octal to some readers; write {shortened(digits)} or quote it"
    if _INTEGER.fullmatch(text):
        number = int(text, 0) if len(text) <= 25 else _LARGEST_INTEGER + 1
        return number, f"the number {shortened(text)} needs more than 64 bits" if abs(number) > _LARGEST_INTEGER else ""
    if _FLOAT.fullmatch(text):
        value = float(text)
        return value, "" if math.isfinite(value) else f"{shortened(text)} is beyond the largest float; write .inf"
    if _INFINITY.fullmatch(text):
        return float(text.replace(".", "")), ""
    if text in (".nan", ".NaN", ".NAN"):
        return 0.0, f"{text} is not a number"
    return text, ""


def shortened(text: str) -> str:
    """Return `text`, cut to what a message can show."""
    return text if len(text) <= 40 else text[:37] + "..."
