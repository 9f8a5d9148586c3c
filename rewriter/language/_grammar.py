"""Check plain values against the grammar, and say what is wrong in the spec's own words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rewriter.language._location import Key
from rewriter.language._problems import Problem
from rewriter.language._schema import PATTERNS, PerForm, RuleForm, SelectorPredicates, SpecForm

Form = TypeVar("Form", bound=BaseModel)

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_BOOLEAN_WORDS = {"on", "off", "yes", "no", "y", "n"}


def check(form: type[Form], data: Any, path: tuple[Key, ...] = ()) -> tuple[Form | None, list[Problem]]:
    """Return `data` as an instance of `form`, or every problem that keeps it from being one."""
    try:
        return form.model_validate(data), []
    except ValidationError as wrong:
        errors = wrong.errors(include_url=False)
        return None, [_explain(error, path, form) for error in errors]


def describe(value: Any) -> str:
    """Return what was found, as people call it.

    >>> describe("on"), describe(True), describe({}), describe(None)
    ("'on'", 'true', 'a mapping', 'nothing')
    """
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int | float):
        return str(value) if abs(value) < 10**20 else "a huge number"
    return f"an object of class {type(value).__name__}"


def _explain(error: ErrorDetails, base: tuple[Key, ...], form: type[BaseModel]) -> Problem:
    path = base + tuple(_parts(error["loc"]))
    kind, found, context = error["type"], error["input"], error.get("ctx", {})
    subject = _subject(path)
    if kind == "missing":
        return Problem(path[:-1], f"missing key {path[-1]!r}")
    if kind == "extra_forbidden":
        known = _known_keys(path, form)
        hint = f"known keys: {', '.join(known)}"
        return Problem(path, f"unknown key {path[-1]!r}", hint, str(path[-1]), known, on_key=True)
    if kind in _EXPECTED:
        message = f"{subject} must be {_EXPECTED[kind]}, found {describe(found)}"
        return Problem(path, message, _remedy(kind, found, path))
    if kind == "wrong_form":
        return Problem(path, f"{subject} {error['msg']}, found {describe(found)}", _remedy(kind, found, path))
    if kind in ("literal_error", "unknown_choice"):
        choices = context.get("choices") or re.findall(r"'([^']*)'", context["expected"])
        named = error["msg"]
        if kind == "literal_error":
            named = f"must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
        word = found if isinstance(found, str) else ""
        return Problem(path, f"{subject} {named}, found {describe(found)}", "", word, choices)
    if kind == "string_pattern_mismatch":
        on_key = "[key]" in error["loc"]
        return Problem(path, f"{describe(found)} is not {PATTERNS[context['pattern']]}", on_key=on_key)
    if kind in ("too_short", "string_too_short"):
        least = context["min_length"]
        if not found:
            return Problem(path, f"{subject} is empty")
        return Problem(path, f"{subject} must have at least {least} entries, found {len(found)}")
    if kind == "greater_than_equal":
        return Problem(path, f"{subject} must be at least {context['ge']}, found {describe(found)}")
    if kind == "step_keys":
        return Problem(path, error["msg"], _step_hint(found))
    if kind == "value_error":
        return Problem(path, f"{subject}: {context['error']}")
    return Problem(path, f"{subject}: {error['msg']}")


def _parts(loc: tuple[int | str, ...]) -> Iterator[Key]:
    """Leave out what Pydantic puts between a document's keys: the tags of union branches, ``[key]``."""
    for part in loc:
        if not (isinstance(part, str) and (part[:1] + part[-1:] == "<>" or part == "[key]")):
            yield part


def _subject(path: tuple[Key, ...]) -> str:
    names = [part for part in path if isinstance(part, str)]
    if not names:
        return "a spec"
    if isinstance(path[-1], int):
        owner = {"rules": "a rule", "chain": "a step of `chain`"}
        return owner.get(names[-1], f"an entry of `{names[-1]}`")
    if len(path) > 2 and path[-3] == "chain":
        return f"the arguments of `{names[-1]}`"
    return f"`{names[-1]}`"


def _known_keys(path: tuple[Key, ...], form: type[BaseModel]) -> list[str]:
    if form is SpecForm and len(path) > 1:
        form = RuleForm if len(path) == 3 else PerForm if path[2] == "per" else SelectorPredicates
    return [field.alias or name for name, field in form.model_fields.items()]


def _remedy(kind: str, found: Any, path: tuple[Key, ...]) -> str:
    if kind == "bool_type" and isinstance(found, str) and found.lower() in _BOOLEAN_WORDS:
        return "on, off, yes and no are text; write true or false"
    if kind == "list_type" and isinstance(found, str) and len(found) <= 60:
        return f"write [{found}]"
    if kind == "string_type" and isinstance(found, int | float):
        return "quote it to make it text"
    if path[-2:-1] == ("chain",) and callable(found):
        if isinstance(found, type):
            return f"give an instance: {found.__name__}(…)"
        return "from Python, a step may also be an instance of torch.nn.Module; put a function into the forward of one"
    if not path and isinstance(found, str):
        return "this text was read as YAML; if it is a path, there is no such file"
    return ""


def _step_hint(found: dict[str, Any]) -> str:
    first = next(iter(found), None)
    if first is not None and found[first] is None:
        return f"indent the arguments of `{first}` further than its name"
    return "start each step with `- `"
