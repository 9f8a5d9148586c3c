"""The arguments and options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rewriter.cli import _inputs
from rewriter.cli._console import set_verbosity, step
from rewriter.errors import ModelFileError, RewriterError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from rewriter.capture import Call
    from rewriter.language import Spec

# `readable=False` turns off Typer's check of files, which would end in a usage error.
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", readable=False, help="The spec, a YAML file; - for stdin.")]
ModelFile = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", readable=False, help="A saved module (.pt), ExportedProgram (.pt2), weights, or their folder."
    ),
]
OUTPUT = typer.Option("--output", "-o", metavar="OUT", readable=False, help="The file to write.")
Output = Annotated[Path, OUTPUT]
OptionalOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="OUT", readable=False, help="The file to write. Default: print the result."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
Way = Literal["auto", "graph", "module", "export"]
Capture = Annotated[
    Way,
    typer.Option("--capture", help="How to find where a tensor is used; export needs --example."),
]


@dataclass
class Common:
    """The options of every command."""

    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors only.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print how long each step takes.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False

    def apply(self) -> None:
        """Set how much the command prints on stderr."""
        set_verbosity(self.quiet, self.verbose)


@dataclass
class SpecOptions:
    """How to read a spec."""

    allow_import: Annotated[
        list[str] | None,
        typer.Option("--allow-import", metavar="PACKAGE", help="A package that the spec may import; repeatable."),
    ] = None

    def read(self, path: Path) -> Spec:
        """Read the spec file, or stdin for ``-``; its imports run only if they are allowed.

        Raises:
            SpecError: also if the file cannot be read.
        """
        from rewriter.language import load_spec

        stdin = str(path) == "-"
        source = _inputs.text_from_stdin() if stdin else path
        with step(f"reading {'stdin' if stdin else path}"), _inputs.working_folder_importable(bool(self.allow_import)):
            return load_spec(source, allow_imports=tuple(self.allow_import or ()))


@dataclass
class ModelOptions:
    """How to read a model file."""

    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODULE:NAME", help="What makes the module: pkg.mod:factory or script.py:Net."),
    ] = None
    key: Annotated[
        str | None, typer.Option("--key", metavar="KEY", help="The entry of a training checkpoint that is the model.")
    ] = None
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="NAME", help="A class or function that MODEL may use; repeatable, pkg.* too."),
    ] = None
    trust: Annotated[bool, typer.Option("--trust", help="Let MODEL run any code that it contains.")] = False

    def words(self) -> list[str]:
        """Return the options as a command line has them."""
        single = [("--model", self.model), ("--key", self.key), *(("--allow", name) for name in self.allow or ())]
        given = [word for option, value in single if value is not None for word in (option, value)]
        return given + ["--trust"] * self.trust

    def read_for(self, spec: Spec, path: Path, capture: Way = "auto") -> nn.Module | ExportedProgram:
        """Read the model file; weights that do not fit the model are loaded into the one that `spec` makes of it."""
        import rewriter

        try:
            return self.read(path)
        except WeightsError as found:
            if found.module is None:
                raise
            rewritten: nn.Module = rewriter.rewrite(found.module, spec, capture=capture)
            try:
                rewritten.load_state_dict(found.weights)
            except RuntimeError as problem:
                lines = str(problem).splitlines()
                text = "\n  ".join(line.strip() for line in lines[1:] or lines)
                text = f"the weights in {path} fit neither the model nor the one that the spec makes of it: {text}"
                raise ModelFileError(text) from problem
            return rewritten

    def read_or_weights(self, path: Path) -> nn.Module | ExportedProgram | dict[str, Tensor]:
        """Read the model file; return weights without their model as a dict."""
        try:
            return self.read(path)
        except WeightsError as found:
            if found.module is not None:
                raise
            return dict(found.weights)

    def read(self, path: Path, file_dtypes: bool = False) -> nn.Module | ExportedProgram:
        """Read the model file; with `file_dtypes`, weights keep their dtypes in the module."""
        if str(path) == "-":
            raise ModelFileError("a model is read from a file; only SPEC can be - for stdin")
        _inputs.refuse_directory(path)
        importable = bool(self.model or self.allow or self.trust)
        with step(f"reading {path}"), _inputs.working_folder_importable(importable):
            from rewriter.cli._script import script_of
            from rewriter.serialization import load_model

            allow = self.allow or []
            with script_of(path, self.model) as (factory, classes):
                return load_model(
                    path,
                    model=factory,
                    key=self.key,
                    allow=[*allow, *classes],
                    trust=self.trust,
                    file_dtypes=file_dtypes,
                )


@dataclass
class StreamOptions:
    """How to write a checkpoint that is streamed."""

    resume: Annotated[
        bool, typer.Option("--resume", help="Folders: keep the complete shards of a run that ended early.")
    ] = False
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=1, help="Checkpoints: tensors evaluated at a time. Default: cores."),
    ] = None

    def refuse(self) -> None:
        """Refuse the options for a model that is read whole."""
        if self.resume or self.workers:
            raise RewriterError("--resume and --workers are for folders, indexes and safetensors files")


@dataclass
class ExampleOptions:
    """Example inputs of the model."""

    example: Annotated[
        list[str] | None,
        typer.Option(
            "--example",
            metavar="[NAME=]DTYPE[SIZE,…]",
            help="A random input: float32[2,3], int64[2,16]:0..999 (a range), mask=bool[2,16] (by name); repeatable.",
        ),
    ] = None
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs",
            metavar="FILE",
            readable=False,
            help="The inputs, written by torch.save: a tensor, a list, or a dict by name. Reading it runs no code.",
        ),
    ] = None

    def read(self) -> Call | None:
        """Make or read the inputs."""
        if self.example and self.inputs is not None:
            raise RewriterError("give the inputs by --example or by --inputs, not by both")
        if not self.example and self.inputs is None:
            return None
        from rewriter.export import call_from_file, example_call

        return call_from_file(self.inputs) if self.inputs is not None else example_call(self.example or [])
