"""``reparam report``: one HTML page about the weights of a model, before and after."""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from rewriter.cli._app import command
from rewriter.cli._console import stderr, step
from rewriter.cli._options import Force, ModelOptions, Output
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import counted
from rewriter.errors import CaptureError, RewriterError, printable


@command("reparam report rewritten.pt -o report.html", "reparam report model.pt rewritten.pt -o report.html")
def report(
    first: Annotated[Path, typer.Argument(metavar="MODEL", readable=False, help="The model, or the model before.")],
    output: Output,
    model_options: ModelOptions,
    second: Annotated[
        Path | None, typer.Argument(metavar="AFTER", readable=False, help="The model after, if there are two.")
    ] = None,
    force: Force = False,
) -> Outcome:
    """Write an HTML page: the rules, and each tensor before and after with norm, singular values and zeros.

    With one MODEL, a computed tensor is compared with its stored tensor. The model before can be bare weights. The page
    needs no network.
    """
    from rewriter.cli._report_data import report_data
    from rewriter.serialization import check_writable, written_atomically

    if str(output) == "-":
        raise RewriterError("a report is written to a file, not to stdout: -o OUT")
    if output.suffix not in (".html", ".htm"):
        raise RewriterError(f"{output}: a report is an HTML page; name the file .html")
    check_writable(output, force)
    before = model_options.read_or_weights(first) if second is not None else None
    after = model_options.read(second or first)
    with step("evaluating"):
        document = {"title": str(second or first), **report_data(after, before)}
    with step("drawing"):
        drawings = _drawing(after)
        if before is not None and not isinstance(before, dict):
            drawings = f"<h3>Before</h3>{_drawing(before)}<h3>After</h3>{drawings}"
    with step(f"writing {output}"), written_atomically(output, force=force) as temporary:
        temporary.write_text(page(document, drawings), encoding="utf-8")
    totals = document["totals"]
    computed = f"{counted(totals['tensors'], 'tensor')}, {totals['computed']} of them computed"
    stderr.print(f"wrote {output}: {computed}; open it in a browser")
    return Outcome({**document, "output": str(output)})


def _drawing(model: Any) -> str:
    """Return the graph as SVG, or why there is none."""
    from rewriter.cli._draw import graph_lines
    from rewriter.cli._fold import folded
    from rewriter.cli._svg import svg_of

    try:
        return svg_of([printable(line) for line in folded(graph_lines(model))])
    except CaptureError as problem:
        return f"<p>{html.escape(str(problem))}</p>"


def page(document: dict[str, Any], drawing: str = "") -> str:
    """Return the page. Names of the model are data in it, and never markup.

    >>> "<b>" in page({"title": "<b>"})
    False

    Arguments:
        document: the data that the page shows.
        drawing: the graphs as SVG.
    """
    template = (resources.files("rewriter.cli") / "report.html").read_text(encoding="utf-8")
    data = json.dumps(document, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(document["title"]), "DRAWING": drawing, "DATA": data}
    before, *rest = template.split("{{")
    made = [before]
    for piece in rest:  # one pass: a name that looks like a placeholder stays as it is
        name, _, text = piece.partition("}}")
        made += [parts[name], text]
    return "".join(made)
