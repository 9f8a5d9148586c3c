"""Annotations of a constructor's arguments: a value is checked against one, and an error says what was expected."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core.core_schema import IsInstanceSchema

from rewriter.language._words import choices, words


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

    @property
    def choices(self) -> list[str]:
        """All texts that a Literal anywhere in the annotation allows."""
        return choices(self._schema())

    def __str__(self) -> str:
        schema = self._schema()
        return words(schema, schema.get("$defs", {}))

    def _schema(self) -> dict[str, Any]:
        return {} if self._adapter is None else self._adapter.json_schema(schema_generator=_Schema)


class _Schema(GenerateJsonSchema):
    def is_instance_schema(self, schema: IsInstanceSchema) -> dict[str, Any]:
        return {"title": schema["cls"].__name__}


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    """Return what validates `annotation`; ``None`` if Pydantic cannot, and the constructor has to."""
    for config in (ConfigDict(arbitrary_types_allowed=True), None):
        try:
            return TypeAdapter(annotation, config=config)
        except (PydanticUserError, TypeError, NameError):
            continue
    return None
