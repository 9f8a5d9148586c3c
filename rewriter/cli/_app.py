"""The Typer application, and the decorator that registers a command."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from rich.markup import escape

from rewriter.cli._console import step
from rewriter.cli._options import Common
from rewriter.cli._outcome import Outcome

app = typer.Typer(
    name="reparam",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
EXAMPLES: dict[str, tuple[str, ...]] = {}
"""The examples of each command's help."""

Command = TypeVar("Command", bound=Callable[..., Outcome])


def command(*examples: str) -> Callable[[Command], Command]:
    """Register a function as a command that has the options of `Common`, too.

    A parameter that is a dataclass stands for the options that are its fields: several commands share it.

    Arguments:
        examples: command lines for the end of the help text.
    """

    def register(function: Command) -> Command:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {
            name: hint for name, hint in hints.items() if name != "return" and dataclasses.is_dataclass(hint)
        }
        options: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(function).parameters.items():
            group = groups.get(name)
            options += _fields(group) if group else [parameter.replace(annotation=hints[name], kind=_KEYWORD)]

        def run(**given: Any) -> Outcome:
            for name, group in [*groups.items(), ("common", Common)]:
                given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            given.pop("common").apply()
            if groups.keys() & {"model_options", "stream"}:  # the function would import it without a word
                with step("loading torch"):
                    importlib.import_module("torch")
            return function(**given)

        paragraphs = (function.__doc__ or "").split("\n\n")
        run.__name__, run.__doc__ = function.__name__, "\n\n".join(" ".join(text.split()) for text in paragraphs)
        options += _fields(Common)
        for hint in [option.annotation for option in options if isinstance(option.default, bool)]:
            hint.__metadata__[0].metavar = ""  # help would show a flag with the value <bool>
        run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        EXAMPLES[function.__name__] = examples
        app.command(epilog=_listed(examples))(run)
        return function

    return register


def _listed(examples: Iterable[str]) -> str:
    return "\n\n".join(["[bold]Examples[/]", *map(escape, examples)])


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _fields(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            _KEYWORD,
            annotation=hints[field.name],
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(group)
    ]


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        print("reparam", metadata.version("reparam"))
    except metadata.PackageNotFoundError:
        print("reparam, from a checkout that is not installed")
    raise typer.Exit


@app.callback(
    epilog=_listed(
        [
            "reparam demo",
            "reparam init model.pt --for spectral-norm -o spec.yaml",
            "reparam plan spec.yaml model.pt",
            "reparam apply spec.yaml model.pt -o rewritten.pt",
            "reparam bake rewritten.pt -o plain.pt",
        ]
    )
)
def reparam(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A compiler for model weights: put parametrizations in from a spec, bake them out again.

    reparam COMMAND -h explains a command.
    """
