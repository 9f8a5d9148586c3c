"""The spec language: text becomes a tree with positions, then checked models, then an immutable Spec."""

from __future__ import annotations

from rewriter.spec._json_schema import json_schema
from rewriter.spec._load import load_spec
from rewriter.spec._location import Location
from rewriter.spec._model import Expect, Per, Rule, Spec, Step
from rewriter.spec._selectors import Selector, TensorInfo, class_names, select

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
    "json_schema",
    "load_spec",
    "select",
]
