"""Annotations of a constructor's arguments: a value is checked against one, and an error says what was expected."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema

from rewriter.language._words import words


class Annotation:
    """The annotation of one argument.

    >>> Annotation(float).read(1)
    1.0
    >>> str(Annotation(float | None))
    'a number or null'
    """

    def __init__(self, annotation: Any) -> None:
        self._adapter = _adapter(annotation)

    def read(self, value: Any) -> Any:
        """Return `value` as the annotation wants it: a list as a tuple, a whole number as a float.

        Raises:
            ValidationError: it does not fit.
        """
        if self._adapter is None:
            return value
        try:
            # Text has no tuples. In Pydantic's rules for JSON, a list fits a tuple.
            return self._adapter.validate_json(json.dumps(value), strict=True)
        except (TypeError, ValueError) as misfit:
            try:
                return self._adapter.validate_python(value, strict=True)
            except ValidationError:
                if isinstance(misfit, ValidationError):
                    raise misfit from None
                raise

    def __str__(self) -> str:
        schema = {} if self._adapter is None else self._adapter.json_schema(schema_generator=_Schema)
        return words(schema, schema.get("$defs", {}))


class _Schema(GenerateJsonSchema):
    """The JSON Schema of an annotation; what JSON has no form for becomes a title alone."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        kind: Any = schema.get("cls", schema["type"])
        return {"title": getattr(kind, "__name__", kind)}


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    """Return what validates `annotation`; ``None`` if Pydantic cannot, and the constructor has to."""
    for config in (ConfigDict(arbitrary_types_allowed=True), None):
        try:
            return TypeAdapter(annotation, config=config)
        except (PydanticUserError, TypeError, NameError):
            continue
    return None
