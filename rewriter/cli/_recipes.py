"""``reparam recipes``: the specs that are installed with reparam."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from rewriter.cli._app import command
from rewriter.cli._console import stderr
from rewriter.cli._options import Force, OptionalOutput
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import table
from rewriter.errors import RewriterError


def _starting_with(incomplete: str) -> list[str]:
    return [name for name in recipe_texts() if name.startswith(incomplete)]


@command("reparam recipes", "reparam recipes spectral_gan", "reparam recipes spectral_gan -o spec.yaml")
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The recipe to print.", autocompletion=_starting_with)
    ] = None,
    output: OptionalOutput = None,
    force: Force = False,
) -> Outcome:
    """List the specs that come with reparam, print one, or copy it to OUT."""
    texts = recipe_texts()
    if name is None:
        if output is not None:
            raise typer.BadParameter("name the recipe to copy: reparam recipes NAME -o OUT")
        titles = {known: text.removeprefix("# ").partition(": ")[0] for known, text in texts.items()}
        return Outcome({"recipes": titles}, table(("name", "what it is"), list(titles.items())))
    if name not in texts:
        raise RewriterError(f"there is no recipe {name!r}; the recipes are {', '.join(texts)}")
    return written_spec({"name": name}, texts[name], output, force)


def recipe_texts() -> dict[str, str]:
    """Return the installed specs by name."""
    folder = resources.files("rewriter") / "recipes"
    found = sorted(folder.iterdir(), key=lambda file: file.name)
    return {Path(file.name).stem: file.read_text(encoding="utf-8") for file in found if file.name.endswith(".yaml")}


def written_spec(
    about: Mapping[str, Any], text: str, output: Path | None, force: bool, model: str = "MODEL"
) -> Outcome:
    """Print a spec, or write it to `output`, whole or not at all; `model` is how the next command names the model."""
    from rewriter.serialization import check_writable, written_atomically

    if output is None or str(output) == "-":
        return Outcome({**about, "text": text}, text.rstrip("\n"))
    check_writable(output, force)
    with written_atomically(output, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
    stderr.print(f"wrote {output}; next: reparam plan {output} {model}")
    return Outcome({**about, "text": text, "output": str(output)})
