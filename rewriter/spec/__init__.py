"""The spec language: text becomes a tree with positions, then checked models, then an immutable Spec."""

from __future__ import annotations

from rewriter.spec._location import Location
from rewriter.spec._model import Expect, Per, Rule, Spec, Step
from rewriter.spec._selectors import Selector, TensorInfo, class_names

__all__ = [
    "Expect",
    "Location",
    "Per",
    "Rule",
    "Selector",
    "Spec",
    "Step",
    "TensorInfo",
    "class_names",
]
