"""The cached values of a graph's sites, validated together when a forward starts.

Where the graph reads a value, everything that it depends on lies in cold memory. To validate it there costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rewriter.context._fingerprint import Fingerprint, same_objects

if TYPE_CHECKING:
    from rewriter.context._policy import CachedValue
    from rewriter.sites._site import Site


class Validated:
    """Validates the cached values of several sites once per forward.

    Arguments:
        sites: those with ``cache: version`` that read nothing but their own originals count.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = [site for site in sites if site.policy.versioned and site.lasting]
        self.cached: list[CachedValue] = []
        self.values: dict[Any, Any] = {}
        self.fingerprint = Fingerprint()

    def find(self) -> dict[Any, Any] | None:
        """Return the values by site if all are valid; None if any is not."""
        cached: list[Any] = [site.policy.across_forwards() for site in self.sites]
        if not same_objects(cached, self.cached):
            self.cached = [] if None in cached else cached
            self.values = {site: found.value for site, found in zip(self.sites, self.cached, strict=False)}
            self.fingerprint = Fingerprint.joined([found.fingerprint for found in self.cached])
        first = self.cached[0] if self.cached else None
        if first is None or not first.same_modes() or not all(found.unwritten() for found in self.cached):
            return None
        return self.values if self.fingerprint.unchanged() else None

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `forward`, in which the sites give their cached values if all are valid."""
        valid = self.find()
        if valid is None:
            return forward(*args, **kwargs)
        running = self.sites[0].contexts.running
        before, running.valid = running.valid, valid
        try:
            return forward(*args, **kwargs)
        finally:
            running.valid = before
