"""What ``reparam catalog NAME`` prints: read off the class itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from rewriter.parametrizations import _registry


@dataclass(frozen=True, slots=True)
class Entry:
    """One parametrization, described.

    Arguments:
        name: what a spec calls it.
        summary: the first sentence of its docstring.
        arguments: the arguments a spec may give, each as ``name: type = default``.
        guarantee: the property of every value it computes, with the tolerance (class attribute ``guarantee``).
        right_inverse: whether a value can be assigned.
        sample: whether it can draw a random value of its space.
        cost: of one evaluation (class attribute ``cost``).
        reference: the paper (class attribute ``reference``), or nothing.
        example: the runnable example of the docstring, or nothing.
    """

    name: str
    summary: str
    arguments: tuple[str, ...]
    guarantee: str
    right_inverse: bool
    sample: bool
    cost: str
    reference: str
    example: str


def describe(name: str, imports: Mapping[str, ModuleType] | None = None) -> Entry:
    """Return the description of a parametrization, from its docstring and class attributes.

    >>> describe("symmetric").guarantee
    'W equals its transpose, exactly'

    Arguments:
        name: a registered name, or a dotted one that `imports` resolves.

    Raises:
        LookupError: nothing has this name.
    """
    factory = _registry.find(name, imports)
    text = inspect.cleandoc(factory.__doc__ or "")
    return Entry(
        name=name,
        summary=text.split("\n\n", 1)[0].replace("\n", " "),
        arguments=tuple(_shown(argument) for argument in _registry.arguments_of(factory).values()),
        guarantee=str(getattr(factory, "guarantee", "")),
        right_inverse=hasattr(factory, "right_inverse"),
        sample=hasattr(factory, "sample"),
        cost=str(getattr(factory, "cost", "")),
        reference=str(getattr(factory, "reference", "")),
        example="\n".join(_example(text.splitlines())),
    )


def _shown(argument: inspect.Parameter) -> str:
    kind = argument.annotation if isinstance(argument.annotation, str) else str(argument)
    default = "" if argument.default is argument.empty else f" = {argument.default!r}"
    return f"{argument.name}: {kind}{default}"


def _example(lines: list[str]) -> list[str]:
    starts = [i for i, line in enumerate(lines) if line.startswith(">>>")]
    if not starts:
        return []
    end = next((i for i, line in enumerate(lines) if i > starts[0] and not line), len(lines))
    return lines[starts[0] : end]
