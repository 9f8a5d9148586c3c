"""The problems of a plan: the same problem on many tensors is one diagnostic with the list of their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rewriter.errors import Diagnostic, PlanError
from rewriter.planning._resolve import Claim

_MOST = 20
"""How many names a message lists."""


class Problems:
    """Collect problems and raise them together.

    Arguments:
        found: problems that are known already.
    """

    def __init__(self, found: Iterable[Diagnostic] = ()) -> None:
        self._found: list[Diagnostic] = list(found)
        self._groups: dict[tuple[str, str, str, str, str], tuple[Claim, list[str]]] = {}

    def __bool__(self) -> bool:
        return bool(self._found or self._groups)

    def add(self, found: Iterable[Diagnostic]) -> None:
        """Add problems that are worded already."""
        self._found += found

    def about(self, claim: Claim, key: str, text: str, hint: str = "", name: str = "", many: str = "") -> None:
        """Add a problem of one tensor.

        Arguments:
            claim: the claim, whose rule has the place.
            key: the rule's key that is to change.
            text: goes on after "0.weight is" or "0.weight, 2.weight are".
            hint: what to do.
            name: the tensor, where it is not the claim's first.
            many: the text for several tensors, where it is another one.
        """
        group = (claim.rule.name, key, text, hint, many or text)
        self._groups.setdefault(group, (claim, []))[1].append(name or claim.name)

    def build_failed(self, claim: Claim, text: str) -> None:
        """Add the reason why a chain cannot be built."""
        group = (claim.rule.name, "chain", text, "", "")
        self._groups.setdefault(group, (claim, []))[1].append(claim.name)

    def raise_any(self) -> None:
        """Raise what was collected.

        Raises:
            PlanError: there is a problem.
        """
        if not self:
            return
        diagnostics = list(self._found)
        for (rule, key, text, hint, many), (claim, names) in self._groups.items():
            about = f"is {text}" if len(names) == 1 else f"are {many}"
            message = f"{listing(names)} {about}" if many else f"rule {rule!r} on {listing(names)}: {text}"
            diagnostics.append(claim.rule.where(key).diagnose(message, hint))
        raise PlanError.of(diagnostics)


def listing(names: Sequence[str]) -> str:
    """Return the names as a list in words, shortened where it is long.

    >>> listing(["0.weight", "1.weight"])
    '0.weight, 1.weight'
    """
    more = len(names) - _MOST
    return ", ".join(names[:_MOST]) + (f" and {more} more" if more > 0 else "")
