"""The members of the catalog, without those that tests register."""

from __future__ import annotations

from benchmarks.serving import catalog as members

__all__ = ["members"]
