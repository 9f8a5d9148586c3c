"""The spec language: a text becomes a document with positions, and a document an immutable Spec."""

from __future__ import annotations

from rewriter.language._document import Location
from rewriter.language._load import load_spec
from rewriter.language._schema import json_schema, reference
from rewriter.language._selector import Predicates, Selector
from rewriter.language._spec import Expect, Per, Rule, Spec
from rewriter.language._step import Step
from rewriter.language._tensors import TensorInfo, class_names

__all__ = [
    "Expect",
    "Location",
    "Per",
    "Predicates",
    "Rule",
    "Selector",
    "Spec",
    "Step",
    "TensorInfo",
    "class_names",
    "json_schema",
    "load_spec",
    "reference",
]
