"""The result of a command: one document for programs, and the same for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rewriter.errors import (
    CaptureError,
    ModelFileError,
    NumericError,
    PlanError,
    RewriterError,
    SpecError,
)

EXIT_CODES: Mapping[type[RewriterError], int] = {
    SpecError: 3,
    PlanError: 4,
    CaptureError: 4,
    NumericError: 5,
    ModelFileError: 6,
}
USAGE = 2
UNEXPECTED = 1
INTERRUPTED = 130


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    Arguments:
        document: JSON data, for ``--json``.
        text: the same for a person, a string or a Rich renderable.
    """

    document: Mapping[str, Any]
    text: Any = field(default="")


def exit_code(error: BaseException) -> int:
    """Return the exit code of `error`.

    >>> exit_code(SpecError([])), exit_code(PlanError("")), exit_code(RewriterError()), exit_code(OSError())
    (3, 4, 2, 1)
    """
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            return code
    return USAGE if isinstance(error, RewriterError) else UNEXPECTED


def error_document(error: BaseException, code: int) -> dict[str, Any]:
    """Return the document of ``--json`` for a failed command."""
    document: dict[str, Any] = {"kind": type(error).__name__, "message": str(error), "exit_code": code}
    if isinstance(error, SpecError | PlanError):
        document["diagnostics"] = [asdict(problem) for problem in error.diagnostics]
    return {"error": document}
