"""The options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# Typer's own check of files would end in a usage error; reading them says which of them it is.
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", readable=False, help="The spec, a YAML file; - for stdin.")]
ModelPath = Annotated[
    Path,
    typer.Argument(metavar="MODEL", readable=False, help="A saved module (.pt), ExportedProgram (.pt2) or weights."),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", readable=False, help="The file to write.")]
OptionalOutput = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", readable=False, help="The file to write.")
]
Factory = Annotated[
    str | None,
    typer.Option("--model", metavar="PKG.MOD:FACTORY", help="What makes the module that weights belong to."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="NAME", help="A class or function that MODEL may use; repeatable, pkg.* too."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Let MODEL run any code it holds.")]
AllowImport = Annotated[
    list[str] | None,
    typer.Option("--allow-import", metavar="PACKAGE", help="A package that the spec's imports may run; repeatable."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Example = Annotated[
    list[str] | None,
    typer.Option("--example", metavar="DTYPE[SIZE,…]", help="An example input, such as float32[2,3]; repeatable."),
]
Way = Literal["auto", "graph", "module", "export"]
Capture = Annotated[
    Way,
    typer.Option(
        "--capture", help="Trace the model, keep its class, whichever works, or use torch.export (with --example)."
    ),
]
