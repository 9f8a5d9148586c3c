"""The members of the catalog, without those that tests register."""

from __future__ import annotations

from rewriter.parametrizations._registry import find, names


def members() -> list[str]:
    """Return the names of the package's own classes."""
    return [name for name in names() if find(name).__module__.startswith("rewriter.parametrizations.")]
