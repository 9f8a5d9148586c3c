"""``reparam diff``: where two models differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from rewriter.cli._app import command
from rewriter.cli._models import Model, entries_of, state_of, values_of
from rewriter.cli._options import ModelOptions
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import counted, shape_text, table
from rewriter.errors import listing

if TYPE_CHECKING:
    from torch import Tensor


@command("reparam diff model.pt plain.pt")
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", readable=False, help="A model file.")],
    second: Annotated[Path, typer.Argument(metavar="B", readable=False, help="Another model file.")],
    model_options: ModelOptions,
) -> Outcome:
    """Compare the tensors of two models, the chains of those that are computed, and their values.

    Weights need no --model here. A rewritten and a baked model have other tensors, and the same values.
    """
    a, b = (model_options.read_or_weights(path) for path in (first, second))
    tensors = _compare(state_of(a), state_of(b))
    chains = _compare_chains(a, b)
    values = _compare_computed(a, b)
    classes = ["weights" if isinstance(one, dict) else type(one).__name__ for one in (a, b)]
    document = {
        "classes": classes,
        "equal": not chains and all(row["change"] == "equal" for row in tensors),
        "tensors": tensors,
        "chains": chains,
        "values": values,
    }
    changed = [row for row in tensors if row["change"] != "equal"]
    rows = [(row["name"], row["change"], row["detail"]) for row in [*changed, *chains]]
    head = f"{first} and {second}: {counted(len(tensors) - len(changed), 'tensor')} equal, {len(changed)} not"
    if classes[0] != classes[1]:
        head += f"; classes {' and '.join(classes)}"
    if values:
        differ = [f"{row['name']} ({row['detail']})" for row in values if not row["agree"]]
        agree = counted(len(values) - len(differ), "computed tensor")
        head += f"\nvalues: {agree} agree" + (f"; not {listing(differ)}" if differ else "")
    return Outcome(document, Group(head, "", table(("name", "change", ""), rows)) if rows else head)


def _compare_computed(*models: Model) -> list[dict[str, Any]]:
    """Compare the values of the tensors that a model computes, up to rounding."""
    names = [name for model in models for entry in entries_of(model) if entry.site for name in entry.names]
    if not names:
        return []
    old, new = map(values_of, models)
    rows = []
    for name in dict.fromkeys(names):
        if name in old and name in new:
            one, other = old[name], new[name]
            detail = _compare_values(one, other)[1] if one.shape == other.shape else f"{_form(one)}, {_form(other)}"
            rows.append({"name": name, "agree": not detail or _close(one, other), "detail": detail})
    return rows


def _close(one: Tensor, other: Tensor) -> bool:
    import torch

    if one.shape != other.shape or not one.is_floating_point() or not other.is_floating_point():
        return False
    rounding = max(torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps) * 32
    return torch.allclose(one.double(), other.double(), rounding, rounding * float(one.detach().double().abs().max()))


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


def _compare_chains(*models: Model) -> list[dict[str, Any]]:
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
