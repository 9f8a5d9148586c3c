"""The context of a forward: which value each site has in it, by the policy of its rule."""

from __future__ import annotations

from rewriter.context._forward import Contexts

__all__ = ["Contexts"]
