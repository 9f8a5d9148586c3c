"""Constructor annotations: check a value against one, and say it in words."""

from __future__ import annotations

import collections.abc
import json
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


class Annotation:
    """What a constructor says of one argument.

    >>> Annotation(float).read(1)
    1.0
    >>> str(Annotation(Literal["matrix_exp", "cayley"] | None))
    "'matrix_exp', 'cayley' or null"
    """

    def __init__(self, annotation: Any) -> None:
        self.annotation = annotation
        self._adapter = _adapter(annotation)

    def read(self, value: Any) -> Any:
        """Return `value` as the annotation wants it: a list as a tuple, a whole number as a float.

        Raises:
            ValidationError: it does not fit.
        """
        if self._adapter is None:
            return value
        try:
            # Text has no tuples, so the rules of JSON hold, where a list may stand for one.
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
        return [choice for choice in _choices(self.annotation) if isinstance(choice, str)]

    def __str__(self) -> str:
        words = list(dict.fromkeys(_words(self.annotation)))
        if "a number" in words and "a whole number" in words:
            words.remove("a whole number")
        return " or ".join(part for part in [", ".join(words[:-1]), words[-1]] if part)


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    """Return what validates `annotation`; ``None`` where Pydantic cannot, and the constructor has to."""
    for config in (ConfigDict(arbitrary_types_allowed=True), None):
        try:
            return TypeAdapter(annotation, config=config)
        except (PydanticUserError, TypeError, NameError):
            continue
    return None


def _choices(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for argument in get_args(annotation):
            yield from _choices(argument)


def _words(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from map(repr, arguments)
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _words(argument)
    elif origin is typing.Annotated:
        yield from _words(arguments[0])
    elif origin is tuple and arguments and ... not in arguments:
        yield f"a list of {len(arguments)} values"
    elif origin in (list, tuple, set, frozenset, collections.abc.Sequence):
        yield "a list" + _of([argument for argument in arguments if argument is not ...])
    elif origin in (dict, collections.abc.Mapping):
        yield "a mapping" + _of(arguments[1:])
    else:
        yield _WORDS.get(annotation) or (
            f"a {annotation.__name__}" if isinstance(annotation, type) else str(annotation)
        )


def _of(annotations: Sequence[Any]) -> str:
    """Say what a container holds, where it holds one kind of thing."""
    words = {word for annotation in annotations for word in _words(annotation)}
    if len(words) != 1:
        return ""
    [word] = words
    return f" of {word[2:]}s" if word.startswith("a ") else f" of {word}"
