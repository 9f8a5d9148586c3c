"""Why a model could not be captured, in the words of what failed, with the line of the user's forward."""

from __future__ import annotations

import traceback

from rewriter.errors import CaptureError

_PACKAGE = __file__.rpartition("capture")[0]
KEPT = "data-dependent forward: kept as it is (module capture)"
"""The reason if tracing fails before it reaches a line of the user's forward."""


def reason(problem: BaseException) -> str:
    """Say why tracing failed, with the line of the user's forward; empty if the failure has no such line."""
    place = _place(problem)
    if not place and not isinstance(problem, CaptureError):
        return ""
    lines = str(problem).strip().splitlines()
    return (lines[0] if lines else type(problem).__name__) + place


def export_reason(problem: BaseException) -> str:
    """Say why torch.export failed: its first line, the sizes that cannot vary, and the line of the user's forward."""
    lines = [line.strip() for line in str(problem).strip().splitlines()]
    text = lines[0].partition(" For more information")[0] if lines else type(problem).__name__
    fixed = [line.removeprefix("- ").partition(". ")[0] for line in lines if line.startswith("- ")]
    return " ".join((text.strip(), *fixed)) + _place(problem)


def _place(problem: BaseException) -> str:
    for frame in reversed(traceback.extract_tb(problem.__traceback__)):
        if "/torch/" not in frame.filename and not frame.filename.startswith("<") and _PACKAGE not in frame.filename:
            return f" (at {frame.filename}:{frame.lineno}: `{frame.line}`)"
    return ""
