"""The cached values of a graph's sites, checked together when a forward starts.

Checking each value where the graph reads it finds what it depends on in cold memory, between two matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rewriter.context._fingerprint import same_objects
from rewriter.context._watch import Watch

if TYPE_CHECKING:
    from rewriter.context._policy import Kept
    from rewriter.sites._site import ParametrizedTensor


class Validated:
    """Finds out, once per forward, whether the cached values of several sites are all valid.

    Arguments:
        sites: sites with ``cache: version`` that read nothing but their own originals.
    """

    def __init__(self, sites: Sequence[ParametrizedTensor]) -> None:
        self.sites = [site for site in sites if site.holding.versioned and site.lasting]
        self.cached: list[Kept] = []
        self.values: dict[Any, Any] = {}
        self.watch = Watch()

    def find(self) -> dict[Any, Any] | None:
        """Return the values by site if all are valid; None if any is not."""
        cached: list[Any] = [site.holding.lasting_value() for site in self.sites]
        if not same_objects(cached, self.cached):
            self.cached = [] if None in cached else cached
            self.values = {site: kept.value for site, kept in zip(self.sites, self.cached, strict=False)}
            self.watch = Watch.joined([kept.watch for kept in self.cached])
        first = self.cached[0] if self.cached else None
        if first is None or not first.same_modes() or not all(kept.unwritten() for kept in self.cached):
            return None
        return self.values if self.watch.unchanged() else None

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `forward`, in which the sites give their cached values if all are valid."""
        valid = self.find()
        if valid is None:
            return forward(*args, **kwargs)
        running = self.sites[0].session.running
        before, running.valid = running.valid, valid
        try:
            return forward(*args, **kwargs)
        finally:
            running.valid = before
