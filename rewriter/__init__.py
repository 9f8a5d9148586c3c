"""reparam: parametrizations of a model's tensors, compiled in from a spec and baked out again.

The public verbs are imported on first use, so that ``import rewriter`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rewriter.errors import (
    CaptureError,
    Diagnostic,
    ModelFileError,
    NumericError,
    PlanError,
    RewriterError,
    SpecError,
)

if TYPE_CHECKING:
    from rewriter._absorb import absorb
    from rewriter._bake import bake
    from rewriter._once import evaluate_once
    from rewriter._plan import plan
    from rewriter._rewrite import rewrite
    from rewriter.language import Spec, load_spec
    from rewriter.parametrizations._chain import chain
    from rewriter.parametrizations._registry import register
    from rewriter.planning import Plan, PlannedSite

_HOMES = {
    "Plan": "rewriter.planning",
    "PlannedSite": "rewriter.planning",
    "Spec": "rewriter.language",
    "absorb": "rewriter._absorb",
    "bake": "rewriter._bake",
    "evaluate_once": "rewriter._once",
    "chain": "rewriter.parametrizations._chain",
    "load_spec": "rewriter.language",
    "plan": "rewriter._plan",
    "register": "rewriter.parametrizations._registry",
    "rewrite": "rewriter._rewrite",
}
_MODULES = frozenset({"export", "io", "state", "testing"})

__all__ = [
    "CaptureError",
    "Diagnostic",
    "ModelFileError",
    "NumericError",
    "Plan",
    "PlanError",
    "PlannedSite",
    "RewriterError",
    "Spec",
    "SpecError",
    "absorb",
    "bake",
    "chain",
    "evaluate_once",
    "load_spec",
    "plan",
    "register",
    "rewrite",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"rewriter.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
