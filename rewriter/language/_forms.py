"""Values that may be written in several forms. The form is found first, so that errors are about that form alone."""

from __future__ import annotations

import sys
from typing import Annotated, Any, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

T = TypeVar("T")
_WORDS = {"text": "text", "mapping": "a mapping", "list": "a list", "number": "a whole number"}


def _form(value: Any) -> str:
    """Return which form a written value has; empty for one that no spec can contain."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return "mapping"
    if isinstance(value, tuple):
        return "list"
    if isinstance(value, int) and not isinstance(value, bool):
        return "number"
    return "module" if is_module(value) else ""


class Forms:
    """Annotates a field that may be written in several forms, with the type of each.

    >>> from pydantic import TypeAdapter
    >>> TypeAdapter(Annotated[Any, Forms(text=str, number=int)]).validate_python(3)
    3
    """

    def __init__(self, **types: Any) -> None:
        self.types = types

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Pydantic puts the tag into the path of an error. A negative number cannot be confused with an index or a key.
        tags = {form: -index for index, form in enumerate(self.types, 1)}
        return core_schema.tagged_union_schema(
            {tags[form]: handler.generate_schema(kind) for form, kind in self.types.items()},
            lambda value: tags.get(_form(value)),
            custom_error_type="wrong_form",
            custom_error_message="must be " + " or ".join(_WORDS[form] for form in self.types if form in _WORDS),
        )


class _NotNull:
    """Annotates a key that may be absent, which is ``None``, and may not be written as null."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: Any = handler(source)
        inner: CoreSchema = schema["schema"] if schema["type"] == "nullable" else schema
        return inner


OrAbsent = Annotated[T | None, _NotNull]


def unfolded(chain: Any) -> Any:
    """Return a chain given from Python as a list of steps: ``A() >> B()`` is two steps, and a module alone is one."""
    steps = chain if isinstance(chain, list | tuple) else [chain] if is_module(chain) else None
    if steps is None:
        return chain
    composed = getattr(sys.modules.get("rewriter.parametrizations._chain"), "Chain", ())
    return [inner for step in steps for inner in (step if isinstance(step, composed) else [step])]


def is_module(value: Any) -> bool:
    """Return whether `value` is a torch module, without an import of torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)
