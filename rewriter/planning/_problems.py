"""The problems of a plan: the same problem on many tensors is one diagnostic with the list of their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from rewriter.errors import Diagnostic, PlanError, listing
from rewriter.planning._resolve import Claim

_NUMBERS = re.compile(r"\d+(, \d+)*")


class _Group(NamedTuple):
    """Tensors of a rule with one problem.

    Arguments:
        claim: of the first tensor; its rule has the place.
        texts: the problem for one tensor, and for several.
        hint: what to do.
        names: the tensors.
        wordings: the texts, which may differ in numbers.
    """

    claim: Claim
    key: str
    texts: tuple[str, str]
    hint: str
    names: list[str]
    wordings: set[str]


class Problems:
    """Collect problems and raise them together.

    Arguments:
        found: problems that are known already.
    """

    def __init__(self, found: Iterable[Diagnostic] = ()) -> None:
        self._found: list[Diagnostic] = list(found)
        self._groups: dict[tuple[str, ...], _Group] = {}

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
        self._collect(claim, key, (f"is {text}", f"are {many or text}"), hint, name or claim.name)

    def build_failed(self, claim: Claim, text: str) -> None:
        """Add the reason why a chain cannot be built."""
        self._collect(claim, "chain", ("", text), "", claim.name)

    def _collect(self, claim: Claim, key: str, texts: tuple[str, str], hint: str, name: str) -> None:
        like = _NUMBERS.sub("#", texts[1].replace(name, ""))
        group = self._groups.setdefault((claim.rule.name, key, like), _Group(claim, key, texts, hint, [], set()))
        group.names.append(name)
        group.wordings.add(texts[1])

    def raise_any(self) -> None:
        """Raise what was collected.

        Raises:
            PlanError: there is a problem.
        """
        if not self:
            return
        diagnostics = list(self._found)
        for claim, key, (one, many), hint, names, wordings in self._groups.values():
            tensors = listing(names)
            message = f"{tensors} {one if len(names) == 1 else many}"
            if not one:
                message = f"rule {claim.rule.name!r} on {tensors}: {many}"
            if len(wordings) > 1:
                message += f" (the numbers are those of {names[0]})"
            diagnostics.append(claim.rule.where(key).diagnose(message, hint))
        raise PlanError.of(diagnostics)
