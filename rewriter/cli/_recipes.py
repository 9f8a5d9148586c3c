"""``reparam recipes``: the specs that are installed with reparam."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli._app import command
from rewriter.cli._console import stderr
from rewriter.cli._options import Force, OptionalOutput
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import table
from rewriter.errors import RewriterError


@command("reparam recipes", "reparam recipes spectral_gan", "reparam recipes spectral_gan -o spec.yaml")
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The recipe to print.")] = None,
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
    if output is None:
        return Outcome({"name": name, "text": texts[name]}, texts[name].rstrip("\n"))
    write_text(output, texts[name], force)
    stderr.print(f"wrote {output}; next: reparam plan {output} MODEL")
    return Outcome({"name": name, "text": texts[name], "output": str(output)})


def recipe_texts() -> dict[str, str]:
    """Return the installed specs by name."""
    folder = resources.files("rewriter") / "recipes"
    found = sorted(folder.iterdir(), key=lambda file: file.name)
    return {Path(file.name).stem: file.read_text(encoding="utf-8") for file in found if file.name.endswith(".yaml")}


def write_text(path: Path, text: str, force: bool) -> None:
    """Write a whole file or none; overwrite only with `force`."""
    from rewriter.serialization import check_writable, written_atomically

    check_writable(path, force)
    with written_atomically(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
