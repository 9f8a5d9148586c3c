"""One step of a chain: a parametrization by name with its arguments, or a module given from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationInfo
from pydantic.json_schema import SkipJsonSchema

from rewriter.language._arguments import Resolver
from rewriter.language._document import Location
from rewriter.language._forms import Forms, OrAbsent
from rewriter.language._problems import Problem, invalid
from rewriter.language._value import FrozenMapping, Value, plain

if TYPE_CHECKING:
    from torch import nn

LABEL = r"^[A-Za-z_][A-Za-z0-9_-]*$"
Text = Annotated[str, Field(min_length=1, max_length=1000)]


class StepKeys(Value):
    """Arguments of the parametrization's constructor, and two keys of the language itself."""

    model_config = ConfigDict(extra="allow")

    label: OrAbsent[Annotated[str, Field(pattern=LABEL)]] = None
    """What to call this step, so that it can be baked or removed alone."""
    inputs: Annotated[tuple[Text, ...], Field(min_length=1)] = ()
    """Names of further tensors of the model that the parametrization's `forward` takes."""


@dataclass(frozen=True)
class Step:
    """One parametrization of a chain.

    Arguments:
        name: as the spec writes it (``orthogonal``, ``my.Scale``); an instance's class name.
        arguments: of the constructor, checked against its signature.
        label: the step's own name, by which it can be baked or removed alone.
        inputs: names of further tensors of the model that ``forward`` takes.
        module: the instance, if the step was given from Python.
        factory: constructs the module; ``None`` for an instance.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=FrozenMapping)
    label: str | None = None
    inputs: tuple[str, ...] = ()
    module: nn.Module | None = None
    factory: Callable[..., nn.Module] | None = field(default=None, compare=False, repr=False)
    location: Location = field(default=Location(), compare=False, repr=False)

    def written(self) -> Any:
        """Return what a spec says: a name, a name with its keys, or the module."""
        if self.module is not None:
            return self.module
        keys = plain(self.arguments)
        keys |= {"label": self.label} if self.label is not None else {}
        keys |= {"inputs": list(self.inputs)} if self.inputs else {}
        return {self.name: keys} if keys else self.name

    def __str__(self) -> str:
        if not self.arguments:
            return self.name
        return f"{self.name}({', '.join(f'{key}={_short(value)}' for key, value in self.arguments.items())})"


def _short(value: Any) -> str:
    """Print an argument; a tensor from Python would take many lines."""
    text = str(value)
    return "…" if "\n" in text else text


def _one_key(written: Any) -> Any:
    if isinstance(written, dict) and len(written) != 1:
        first = next(iter(written), None)
        hint = "start each step with `- `"
        if first is not None and written[first] is None:
            hint = f"indent the arguments of `{first}` further than its name"
        raise invalid([Problem((), f"a step names one parametrization, found {len(written)}", hint)])
    return written


def _step(written: Any, info: ValidationInfo) -> Step:
    """Return the step, with the class and the arguments that the resolver finds for its name."""
    if isinstance(written, str):
        written = {written: None}
    if not isinstance(written, dict):
        return Step(type(written).__name__, module=written)
    [(name, keys)] = written.items()
    keys = keys or StepKeys()
    resolver = info.context if isinstance(info.context, Resolver) else Resolver()
    factory, arguments = resolver.resolve(name, plain(keys.model_extra))
    return Step(name, FrozenMapping(arguments), keys.label, keys.inputs, factory=factory)


WrittenStep = Annotated[
    Step,
    Forms(
        text=Text,
        mapping=Annotated[
            dict[Text, StepKeys | None],
            Field(min_length=1, max_length=1, description="The parametrization's name with its arguments."),
            BeforeValidator(_one_key),
        ],
        module=SkipJsonSchema[Any],
    ),
    AfterValidator(_step),
    PlainSerializer(Step.written),
]
"""A name, a mapping from the name to its keys, or a module."""
