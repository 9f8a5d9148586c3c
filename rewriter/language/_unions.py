"""Values that may take one of several forms, told apart before they are checked.

Pydantic then reports the problems of the one form that was meant, and not those of all others beside them.
"""

from __future__ import annotations

import sys
from typing import Any

from pydantic import Discriminator, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

_NAMED = {"text": "text", "mapping": "a mapping", "list": "a list", "number": "a whole number"}


def shape_of(value: Any) -> str | None:
    """Return which form of a union `value` takes: the tag that Pydantic chooses the branch by."""
    if isinstance(value, str):
        return "<text>"
    if isinstance(value, dict):
        return "<mapping>"
    if isinstance(value, list):
        return "<list>"
    if isinstance(value, int) and not isinstance(value, bool):
        return "<number>"
    return "<module>" if is_module(value) else None


def is_module(value: Any) -> bool:
    """Return whether `value` is a torch module, without importing torch for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def unfolded(chain: Any) -> Any:
    """Return a chain given from Python as a list of steps: ``A() >> B()`` is two of them, and a module alone is one."""
    compose = sys.modules.get("rewriter.parametrizations._chain")
    steps = chain if isinstance(chain, list | tuple) else [chain] if is_module(chain) else None
    if steps is None:
        return chain
    return [
        inner
        for step in steps
        for inner in (step if compose is not None and isinstance(step, compose.Chain) else [step])
    ]


def forms(*wanted: str) -> Discriminator:
    """Return what chooses between branches by the tags that `shape_of` gives."""

    def form(value: Any) -> str | None:
        shape = shape_of(value)
        return shape if shape in {f"<{name}>" for name in wanted} else None

    known = [_NAMED[name] for name in wanted if name in _NAMED]
    return Discriminator(form, "wrong_form", "must be " + " or ".join(known))


class ModuleForm:
    """A torch module given from Python; it has no form in JSON."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return core_schema.any_schema()

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"not": {}}
