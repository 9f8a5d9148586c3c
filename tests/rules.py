"""Specs with one rule."""

from __future__ import annotations

from typing import Any


def one_rule(*chain: Any, select: Any = "*.weight", **options: Any) -> dict[str, Any]:
    """Return a spec whose only rule puts `chain` on the tensors that `select` names."""
    return {"reparam": 1, "rules": [{"name": "r", "select": select, "chain": list(chain), **options}]}
