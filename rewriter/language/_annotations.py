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
        try:
            self._adapter = TypeAdapter[Any](annotation, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # a model has a configuration of its own
            self._adapter = TypeAdapter(annotation)

    def read(self, value: Any) -> Any:
        """Return `value` as the annotation wants it: a list as a tuple, a whole number as a float.

        Raises:
            ValidationError: it does not fit.
        """
        try:
            # Text has no tuples. In Pydantic's rules for JSON, a list fits a tuple.
            return self._adapter.validate_json(json.dumps(value), strict=True)
        except (TypeError, ValueError) as misfit:
            try:
                return self._adapter.validate_python(value, strict=True)
            except ValidationError as wrong:
                raise misfit if isinstance(misfit, ValidationError) else wrong from None

    def __str__(self) -> str:
        schema = self._adapter.json_schema(schema_generator=_Schema)
        return words(schema, schema.get("$defs", {}))


class _Schema(GenerateJsonSchema):
    """The JSON Schema of an annotation; what JSON has no form for becomes a title alone."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        kind: Any = schema.get("cls", schema["type"])
        return {"title": getattr(kind, "__name__", kind)}
