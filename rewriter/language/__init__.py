"""The spec language: text becomes a tree with positions, then checked models, then an immutable Spec."""

from __future__ import annotations

from rewriter.language._json_schema import json_schema
from rewriter.language._load import load_spec
from rewriter.language._location import Location
from rewriter.language._model import Expect, Per, Rule, Spec, Step
from rewriter.language._selectors import Selector, TensorInfo, class_names, select

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
