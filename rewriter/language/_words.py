"""JSON Schema in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_TYPES = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}


def words(schema: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    """Return what values a JSON Schema allows.

    >>> words({"anyOf": [{"enum": ["a", "b"]}, {"type": "array", "items": {"type": "integer"}}]}, {})
    "'a', 'b' or a list of whole numbers"

    Arguments:
        models: the schema's ``$defs``.
    """
    found = list(dict.fromkeys(_words(schema, models)))
    if "a number" in found and "a whole number" in found:
        found.remove("a whole number")
    return " or ".join(part for part in (", ".join(found[:-1]), found[-1]) if part)


def _words(schema: Mapping[str, Any], models: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        # A model inside itself is not written out again.
        schema, models = models.get(name, {}), {other: model for other, model in models.items() if other != name}
    kind = schema.get("type")
    if "const" in schema or "enum" in schema:
        yield from map(repr, schema.get("enum", [schema.get("const")]))
    elif "anyOf" in schema or "oneOf" in schema:
        for choice in schema.get("anyOf") or schema["oneOf"]:
            yield from _words(choice, models)
    elif kind == "array" and "prefixItems" in schema:
        yield f"a list of {len(schema['prefixItems'])} values"
    elif kind == "array":
        yield "a list" + _of(schema.get("items"), models)
    elif kind == "object":
        yield "a mapping" + _of(schema.get("additionalProperties"), models)
    else:
        yield _TYPES.get(str(kind)) or str(kind or f"a {schema.get('title', 'value')}")


def _of(schema: Any, models: Mapping[str, Any]) -> str:
    """Return what a container contains, if it contains one kind of value."""
    if not schema or not isinstance(schema, dict):
        return ""
    inner = words(schema, models)
    return f" of {inner[2:]}s" if inner.startswith("a ") and " or " not in inner else f" of {inner}"
