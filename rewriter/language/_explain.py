"""Pydantic's errors in the spec's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rewriter.language._document import Key
from rewriter.language._problems import Problem, choices_of, describe
from rewriter.language._selector import DOTTED, Predicates
from rewriter.language._spec import NAME, PREFIX, Per, Rule, Spec
from rewriter.language._step import LABEL

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_PATTERNS = {
    PREFIX: "a name of letters, digits and _",
    DOTTED: "a dotted name such as torch.nn.Linear",
    LABEL: "a label of letters, digits, _ and -",
    NAME: "a name on one line without spaces around it",
}
_BOOLEAN_WORDS = {"on", "off", "yes", "no", "y", "n"}


def explain(wrong: ValidationError) -> list[Problem]:
    """Return the problems of a spec that `Spec` refuses."""
    return [_explain(error) for error in wrong.errors(include_url=False)]


def _explain(error: ErrorDetails) -> Problem:
    kind, found, context = error["type"], error["input"], error.get("ctx", {})
    # Between a document's keys, Pydantic puts the tags of forms, which are negative, and "[key]" at the end.
    path = tuple(part for part in error["loc"] if not (isinstance(part, int) and part < 0))
    on_key = path[-1:] == ("[key]",) and kind != "extra_forbidden"
    path = path[:-1] if on_key else path
    subject, shown = "a key" if on_key else _subject(path), describe(found)
    wanted = f"must be {_EXPECTED[kind]}" if kind in _EXPECTED else error["msg"].replace("Input should be", "must be")
    message = f"{subject} {wanted}, found {shown}"
    match kind:
        case "problem":
            problem: Problem = context["problem"]
            return replace(problem, path=path)
        case "missing":
            hint = "write `reparam: 1` as the first line" if path == ("reparam",) else ""
            return Problem(path[:-1], f"missing key {path[-1]!r}", hint)
        case "extra_forbidden":
            known = _known_keys(path)
            hint = f"known keys: {', '.join(known)}"
            return Problem(path, f"unknown key {path[-1]!r}", hint, str(path[-1]), known, on_key=True)
        case "wrong_form":
            return Problem(path, message, _remedy(found, path))
        case "literal_error" | "unknown_choice":
            return Problem(path, message, "", found if isinstance(found, str) else "", choices_of(error))
        case "string_pattern_mismatch":
            return Problem(path, f"{shown} is not {_PATTERNS[context['pattern']]}", on_key=on_key)
        case "too_short" | "string_too_short":
            few = f"must have at least {context['min_length']} entries, found {len(found)}" if found else "is empty"
            return Problem(path, f"{subject} {few}")
        case "value_error":
            return Problem(path, f"{subject}: {context['error']}")
    return Problem(path, message, _remedy(found, path, kind))


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


def _known_keys(path: tuple[Key, ...]) -> list[str]:
    model: Any = Spec
    if len(path) > 1:
        model = Rule if len(path) == 3 else Per if path[2] == "per" else Predicates
    return [field.alias or name for name, field in model.model_fields.items()]


def _remedy(found: Any, path: tuple[Key, ...], kind: str = "") -> str:
    if not path and isinstance(found, str):
        return "this text was read as YAML; if it is a path, there is no such file"
    if kind == "bool_type" and isinstance(found, str) and found.lower() in _BOOLEAN_WORDS:
        return "on, off, yes and no are text; write true or false"
    if path[-1:] == ("rules",) and isinstance(found, Mapping):
        return "start each rule with `- `"
    if path[-1:] == ("select",) and isinstance(found, type):
        return f'write {{"module": "{found.__module__}.{found.__qualname__}"}}'
    if kind == "tuple_type" and isinstance(found, str) and len(found) <= 60:
        return f"write [{found}]"
    if kind == "string_type" and isinstance(found, int | float):
        return "quote it to make it text"
    if path[-2:-1] == ("chain",) and callable(found):
        if isinstance(found, type):
            return f"give an instance: {found.__name__}(…)"
        return "from Python, a step may also be an instance of torch.nn.Module; put a function into the forward of one"
    return ""
