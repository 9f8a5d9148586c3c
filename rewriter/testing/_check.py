"""Check the laws of a parametrization that the compiler and torch rely on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.context._random import nothing_drawn
from rewriter.errors import RewriterError
from rewriter.testing._case import Case, NotApplicable, Subject, Violated
from rewriter.testing._laws import LAWS


class LawError(RewriterError, AssertionError):
    """A parametrization violates laws; carries the report."""

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(str(report))


@dataclass(frozen=True)
class Report:
    """The outcome of each law: ``"holds"``, ``"does not apply: …"`` or what was found.

    Arguments:
        subject: the parametrization, printed.
        results: the outcome of each law by its name.
    """

    subject: str
    results: Mapping[str, str]

    @property
    def violated(self) -> dict[str, str]:
        """The laws that do not hold, with what was found."""
        return {law: found for law, found in self.results.items() if not found.startswith(("holds", "does not apply"))}

    def __str__(self) -> str:
        width = max(map(len, self.results), default=0)
        head = f"{self.subject} violates {len(self.violated)} of {len(self.results)} laws"
        return "\n".join([head, *(f"  {law:<{width}}  {found}" for law, found in self.results.items())])


def check_parametrization(
    subject: Subject,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
    arguments: Mapping[str, Any] | None = None,
    originals: Sequence[Tensor] | None = None,
    skip: Collection[str] = (),
    tolerance: float | None = None,
    seed: int = 0,
) -> Report:
    """Check the laws of a parametrization and return the outcome of each.

    >>> report = check_parametrization("skew", (3, 3))
    >>> report.results["right inverse"]
    'holds'

    The global random state does not change.

    Arguments:
        subject: a module, a class or factory, or a name that a spec could use.
        shape: of the weight.
        dtype: of the weight. Gradients are checked in float64 and complex128 only: in other precisions finite
            differences are too coarse.
        arguments: for the constructor; ``weight`` and ``size`` are filled in.
        originals: the tensors to evaluate at. By default the right inverse of a random weight, moved a little; the
            weight itself if there is no right inverse.
        skip: names of laws (see ``LAWS``) that the parametrization does not promise, such as ``"gradient"`` of a
            quantizer.
        tolerance: for two values that should be equal, relative to their size; by default ``1e3 * n * eps``.
        seed: of the random weight.

    Raises:
        LawError: a law does not hold; the message lists every law.
        ValueError: `skip` names no law.
    """
    unknown = set(skip) - set(LAWS)
    if unknown:
        raise ValueError(f"no law is called {sorted(unknown)}; the laws are {list(LAWS)}")
    with nothing_drawn(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message=".*torch.jit.*|Complex modules are a new feature|Input #. requires gradient and is not a double",
        )
        torch.manual_seed(seed)
        case = Case.of(subject, torch.randn(*shape, dtype=dtype), arguments or {}, originals, tolerance)
        results = {
            law: "does not apply: skipped" if law in skip else _outcome(check, case) for law, check in LAWS.items()
        }
    report = Report(str(case.module).splitlines()[0], results)
    if report.violated:
        raise LawError(report)
    return report


def _outcome(check: Callable[[Case], None], case: Case) -> str:
    try:
        check(case)
    except NotApplicable as reason:
        return f"does not apply: {reason}"
    except Violated as found:
        return str(found)
    except Exception as error:  # a parametrization may raise anything, and that is the outcome
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return "holds"
