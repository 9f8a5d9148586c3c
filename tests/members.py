"""The members of the catalog, whatever else tests have registered."""

from __future__ import annotations

from rewriter.parametrizations._registry import find, names


def members() -> list[str]:
    """Return the names that specs can use without an import, of the product's own classes."""
    return [name for name in names() if find(name).__module__.startswith("rewriter.parametrizations.")]
