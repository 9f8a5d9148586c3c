"""``reparam diff``: where two models differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from rewriter.cli._app import command
from rewriter.cli._console import step
from rewriter.cli._inputs import streamed
from rewriter.cli._models import entries_of, state_of, values_of
from rewriter.cli._options import ModelOptions, SpecOptions
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import counted, shape_text, table
from rewriter.errors import RewriterError, listing

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.language import Spec


@dataclass(frozen=True)
class _Side:
    """One of the two, in memory or in files.

    Arguments:
        kind: the class of the model.
        tensors: the stored tensors.
        chains: the chain of each computed tensor, by its first name.
        computed: all names of computed tensors.
        values: returns the plain tensors, by each of their names.
        unknown: computed tensors whose values nobody can tell.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    chains: Mapping[str, str]
    computed: Sequence[str]
    values: Callable[[], Mapping[str, Tensor]]
    unknown: Sequence[str] = ()


@command("reparam diff model.pt plain.pt", "reparam diff FOLDER OTHER", "reparam diff REWRITTEN BAKED --spec spec.yaml")
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", readable=False, help="A model file, or a folder of shards.")],
    second: Annotated[Path, typer.Argument(metavar="B", readable=False, help="Another one.")],
    model_options: ModelOptions,
    spec_options: SpecOptions,
    spec: Annotated[
        Path | None,
        typer.Option(
            "--spec", metavar="SPEC", readable=False, help="The spec, for chains that a folder does not record."
        ),
    ] = None,
) -> Outcome:
    """Compare two models: the tensors that they store, their chains, and the values of computed tensors.

    A rewritten model and its baked model store different tensors and have the same values. Weights need no --model
    here. Folders and indexes are streamed, one tensor in memory at a time.
    """
    read = spec_options.read(spec) if spec is not None else None
    both = a, b = [_side(path, model_options, read) for path in (first, second)]
    if read is not None and not any(streamed(path, True) for path in (first, second)):
        raise RewriterError("--spec is for folders, indexes and safetensors files; a model has its chains with it")
    with step("comparing"):
        tensors = _compare(a.tensors, b.tensors)
        chains = _compare_chains(a.chains, b.chains)
        values = _compare_computed(a, b)
    document = {
        "classes": [side.kind for side in both],
        "equal": not chains and all(row["change"] == "equal" for row in tensors),
        "tensors": tensors,
        "chains": chains,
        "values": values,
    }
    changed = [row for row in tensors if row["change"] != "equal"]
    rows = [(row["name"], row["change"], row["detail"]) for row in [*changed, *chains]]
    head = f"{first} and {second}: {counted(len(tensors) - len(changed), 'tensor')} equal, {len(changed)} not"
    if a.kind != b.kind:
        head += f"; classes {a.kind} and {b.kind}"
    if values:
        differ = [f"{row['name']} ({row['detail']})" for row in values if not row["agree"]]
        head += f"\ncomputed values: {len(values) - len(differ)} agree, {len(differ)} differ"
        head += f": {listing(differ)}" if differ else ""
    unknown = list(dict.fromkeys([*a.unknown, *b.unknown]))
    if unknown:
        head += f"\nvalues not compared: {listing(unknown)}; the files do not record all of their chains: --spec SPEC"
    return Outcome(document, Group(head, "", table(("name", "change", ""), rows)) if rows else head)


def _side(path: Path, options: ModelOptions, spec: Spec | None) -> _Side:
    if streamed(path, options.model is None):
        from rewriter.streaming import contents_of, open_checkpoint

        found = contents_of(open_checkpoint(path), spec)
        computed = [name for name in found.computed if name in found.values]
        return _Side("Checkpoint", found.stored, found.chains, computed, lambda: found.values, found.unknown)
    model = options.read_or_weights(path)
    entries = [entry for entry in entries_of(model) if entry.site]
    chains = {entry.name: " >> ".join(entry.site.spec.chain) for entry in entries if entry.site}
    names = [name for entry in entries for name in entry.names]
    kind = "weights" if isinstance(model, dict) else type(model).__name__
    return _Side(kind, state_of(model), chains, names, lambda: values_of(model))


def _compare_computed(a: _Side, b: _Side) -> list[dict[str, Any]]:
    """Compare the values of the tensors that a model computes, up to rounding."""
    names = dict.fromkeys([*a.computed, *b.computed])
    if not names:
        return []
    old, new = a.values(), b.values()
    rows = []
    for name in names:
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


def _compare(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for name in [*old, *(name for name in new if name not in old)]:
        one, other = old.get(name), new.get(name)
        if one is None or other is None:
            present = one if other is None else other
            assert present is not None
            change, detail = f"only in the {'first' if other is None else 'second'}", _form(present)
        elif _form(one) != _form(other):
            change, detail = "form", f"{_form(one)} → {_form(other)}"
        else:
            change, detail = _compare_values(one, other)
        rows.append({"name": name, "change": change, "detail": detail})
    return rows


def _compare_values(old: Tensor, new: Tensor) -> tuple[str, str]:
    if not old.isclose(new, rtol=0, atol=0, equal_nan=True).all():
        return "values", f"largest difference {float((old.detach().double() - new.detach().double()).abs().max()):.2e}"
    return "equal", ""


def _form(tensor: Tensor) -> str:
    return f"{shape_text(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _compare_chains(old: Mapping[str, str], new: Mapping[str, str]) -> list[dict[str, Any]]:
    details = {name: (old.get(name, "plain"), new.get(name, "plain")) for name in {**old, **new}}
    return [
        {"name": name, "change": "chain", "detail": f"{before} → {after}"}
        for name, (before, after) in details.items()
        if before != after
    ]
