"""TensorTable: what planning needs of a model, be it a module or a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rewriter.capture import Capture
from rewriter.planning._problems import Problems
from rewriter.planning._resolve import Claim
from rewriter.planning._survey import Entry
from rewriter.sites import Site


class TensorTable(Protocol):
    """The tensors of a model, and the questions that planning asks about their uses.

    Arguments:
        model: the module or program.
        entries: every tensor once, in the model's order.
        foreign: tensors that another tool computes, each with the tool's name. No rule can own them.
        absorbed: entries that another tool computed, with the sites that replace the tool.
    """

    model: Any
    entries: list[Entry]
    foreign: Sequence[tuple[Entry, str]]
    absorbed: Sequence[tuple[Entry, Site]]

    def refuse(self, claims: Sequence[Claim], problems: Problems) -> None:
        """Add why this kind of model cannot have some of the claims; known before it is captured."""

    def capture(self, owners: Sequence[str]) -> Capture:
        """Capture the model; `owners` are the paths of the modules that own claimed tensors."""

    def reached(self, way: Capture, site: Site) -> tuple[str, str]:
        """Return how the uses of a site's tensor are reached, and the reason."""
