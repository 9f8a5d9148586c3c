"""``reparam diff``: where two models differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from rewriter.cli._app import command
from rewriter.cli._models import entries_of, state_of
from rewriter.cli._options import ModelOptions
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import counted, shape_text, table

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram


@command("reparam diff model.pt plain.pt")
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", readable=False, help="A model file.")],
    second: Annotated[Path, typer.Argument(metavar="B", readable=False, help="Another model file.")],
    model_options: ModelOptions,
) -> Outcome:
    """Compare the tensors of two models, and the chains of those that are computed."""
    a, b = (model_options.read(path) for path in (first, second))
    tensors = _compare(state_of(a), state_of(b))
    chains = _compare_chains(a, b)
    classes = [type(a).__name__, type(b).__name__]
    document = {
        "classes": classes,
        "equal": not chains and all(row["change"] == "equal" for row in tensors),
        "tensors": tensors,
        "chains": chains,
    }
    changed = [row for row in tensors if row["change"] != "equal"]
    rows = [(row["name"], row["change"], row["detail"]) for row in [*changed, *chains]]
    head = f"{first} and {second}: {counted(len(tensors) - len(changed), 'tensor')} equal, {len(changed)} not"
    if classes[0] != classes[1]:
        head += f"; classes {' and '.join(classes)}"
    return Outcome(document, Group(head, "", table(("name", "change", ""), rows)) if rows else head)


def _compare(old: dict[str, Tensor], new: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new:
            change, detail = "only in the first", _form(old[name])
        elif name not in old:
            change, detail = "only in the second", _form(new[name])
        elif _form(old[name]) != _form(new[name]):
            change, detail = "form", f"{_form(old[name])} → {_form(new[name])}"
        else:
            change, detail = _compare_values(old[name], new[name])
        rows.append({"name": name, "change": change, "detail": detail})
    return rows


def _compare_values(old: Tensor, new: Tensor) -> tuple[str, str]:
    if not old.isclose(new, rtol=0, atol=0, equal_nan=True).all():
        return "values", f"largest difference {float((old.detach().double() - new.detach().double()).abs().max()):.2e}"
    return "equal", ""


def _form(tensor: Tensor) -> str:
    return f"{shape_text(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _compare_chains(*models: nn.Module | ExportedProgram) -> list[dict[str, Any]]:
    old, new = (
        {entry.name: " >> ".join(entry.site.spec.chain) for entry in entries_of(model) if entry.site}
        for model in models
    )
    details = {name: (old.get(name, "plain"), new.get(name, "plain")) for name in {**old, **new}}
    return [
        {"name": name, "change": "chain", "detail": f"{before} → {after}"}
        for name, (before, after) in details.items()
        if before != after
    ]
