"""The members of the catalog, without those that tests register."""

from __future__ import annotations

from rewriter.parametrizations._registry import find, names


def members() -> list[str]:
    """Return the names of the package's own classes."""
    homes = {name: find(name).__module__ for name in names()}
    # A doctest of the registry registers one more.
    return [
        name
        for name, home in homes.items()
        if home.startswith("rewriter.parametrizations.") and not home.endswith("._registry")
    ]
