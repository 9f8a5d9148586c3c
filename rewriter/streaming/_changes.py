"""What adapters of PEFT change: each change with its tensor, checked by shapes, and added to blocks of rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.absorbing import LowRankChange
from rewriter.parametrizations.maths._precision import widen
from rewriter.serialization._peft_folder import scale, sorted_parts
from rewriter.streaming._checkpoint import Checkpoint, read_rows, read_tensor
from rewriter.streaming._header import Header, Stored

_NESTED = ".base_layer"
"""PEFT wraps a module once for each parameter of `target_parameters`, each wrapper around the one before."""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose tensors were not read yet.

    Arguments:
        folder: where it is.
        weight: the factor of its changes.
        settings: what its `adapter_config.json` says.
        header: of its tensors.
    """

    folder: Path
    weight: float
    settings: Mapping[str, Any]
    header: Header


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one tensor, or puts in its place.

    Arguments:
        adapter: the adapter.
        path: of the layer, or the name of the parameter.
        parts: its tensors, by PEFT's names; the one name ``""`` for a tensor that replaces the base's.
    """

    adapter: Adapter
    path: str
    parts: Mapping[str, Stored]

    @property
    def replaces(self) -> bool:
        """Whether the tensor takes the place of the base's."""
        return "" in self.parts

    @property
    def factors(self) -> tuple[Stored, Stored]:
        """A and B."""
        kind = "lora_" if "lora_A" in self.parts else "lora_embedding_"
        return self.parts[f"{kind}A"], self.parts[f"{kind}B"]


def changes_of(adapter: Adapter, base: Checkpoint) -> Iterator[tuple[str, Change]]:
    """Yield the changes of an adapter, each with the name of the tensor that it changes."""
    layers, others = sorted_parts({stored.name: stored for stored in adapter.header.tensors})
    for name, stored in others.items():
        yield name, Change(adapter, name.rpartition(".")[0], {"": stored})
    targets = adapter.settings.get("target_parameters") or ()
    wrapped: dict[str, list[dict[str, Stored]]] = {}
    for path, parts in layers.items():
        wrapped.setdefault(path.replace(_NESTED, ""), []).append(parts)
    for path, found in wrapped.items():
        inside = [name for name in base.tensors if name.rpartition(".")[0] == path]
        names = [name for name in inside if any(f".{name}".endswith(f".{target}") for target in targets)]
        if len(found) == 1 and len(names) < 2:
            name = names[0] if names else f"{path}.weight"
            yield name, Change(adapter, name if names else path, found[0])
        else:
            yield from _of_parameters(adapter, base, path, names, found)


def _of_parameters(
    adapter: Adapter, base: Checkpoint, path: str, names: Sequence[str], found: Sequence[Mapping[str, Stored]]
) -> Iterator[tuple[str, Change]]:
    """Yield the changes of a module's parameters. No file says which wrapper is of which one, but shapes may."""
    changes = [[Change(adapter, name, parts) for parts in found] for name in names]
    fits = [[not misfit(base.tensors[one.path], one) for one in row] for row in changes]
    orders = [
        order
        for order in itertools.permutations(range(len(found)), len(found))
        if len(names) == len(found) and all(fits[row][column] for row, column in enumerate(order))
    ]
    for row, column in enumerate(orders[0] if len(orders) == 1 else ()):
        yield names[row], changes[row][column]
    if len(orders) != 1:
        yield f"{path}.*", Change(adapter, path, found[0])


def misfit(base: Stored, change: Change) -> str:
    """Say why a change does not fit a tensor; empty if it does."""
    if not base.dtype.is_floating_point or base.dtype.itemsize < 2:
        return f"the base has {base.dtype}, to which nothing can be added: merge into the weights it was quantized from"
    if change.replaces:
        shape = change.parts[""].shape
        return "" if shape == base.shape else f"the adapter has {list(shape)}, and the base {list(base.shape)}"
    if not ({"lora_A", "lora_B"} <= change.parts.keys() or {"lora_embedding_A", "lora_embedding_B"} == {*change.parts}):
        return f"the adapter has only {', '.join(sorted(change.parts))} for it"
    A, B = (stored.shape for stored in change.factors)
    layouts = _layouts(base.shape, change) if len(A) > 1 and len(B) > 1 and A[0] == B[1] else []
    if not layouts:
        return f"the adapter has A {list(A)} and B {list(B)}, and the base {list(base.shape)}"
    if len(layouts) > 1 and layouts[0] == "experts":
        return "its experts are square, and whether they are transposed (is_transposed) is in the model's code alone"
    return ""


def _layouts(shape: tuple[int, ...], change: Change) -> list[str]:
    """Return the layouts of `LowRankChange` in which A and B have the shape of the base, the likely one first."""
    A, B = (stored.shape for stored in change.factors)
    if "lora_embedding_A" in change.parts:
        fitting = {"embedding": shape == (A[1], B[0])}
    elif len(shape) == 3 and len(A) == 2:
        whole = A[0] % max(shape[0], 1) == 0 and len(change.parts) == 2
        fitting = {
            "experts": whole and shape[1:] == (B[0], A[1]),
            "experts_transposed": whole and shape[1:] == (A[1], B[0]),
        }
    elif len(shape) > 2:
        fitting = {"conv": shape == (B[0], *A[1:])}
    else:
        fitting = {"linear": shape == (B[0], A[1]), "transposed": shape == (A[1], B[0])}
        if change.adapter.settings.get("fan_in_fan_out"):
            fitting = dict(reversed(fitting.items()))
    return [layout for layout, fits in fitting.items() if fits]


def merged_rows(base: Stored, changes: Sequence[Change]) -> Iterator[Tensor]:
    """Yield the rows of a changed tensor, in blocks."""
    added = [_Added(base.shape, change) for change in changes if not change.replaces]
    replaced = [change.parts[""] for change in changes if change.replaces]
    if any(one.needs_all_rows for one in added):
        blocks = iter([(0, read_tensor(replaced[0] if replaced else base))])
    else:
        blocks = read_rows(replaced[0] if replaced else base)
    for first, read in blocks:
        value = read.to(base.dtype)
        for one in added:
            value = one.to_rows(value, first)
        yield value


class _Added:
    """What a change adds, with A and B in memory."""

    def __init__(self, shape: tuple[int, ...], change: Change) -> None:
        self.A, self.B = map(read_tensor, change.factors)
        magnitude = change.parts.get("lora_magnitude_vector")
        self.magnitude = None if magnitude is None else read_tensor(magnitude)
        self.layout = _layouts(shape, change)[0]
        self.experts = shape[0] if self.layout.startswith("experts") else 1
        rank = self.A.shape[0] // self.experts
        self.factor = scale(change.path, rank, change.adapter.settings) * change.adapter.weight

    @property
    def needs_all_rows(self) -> bool:
        """Whether a row of the value depends on other rows of the base."""
        return self.magnitude is not None and self.layout == "transposed"

    def to_rows(self, value: Tensor, first: int) -> Tensor:
        """Return rows of the base with the change; `value` is overwritten. `first` is the number of the first row."""
        rows = slice(first, first + len(value))
        A, B, magnitude = self.A, self.B, self.magnitude
        if self.layout.startswith("experts"):
            A = A.reshape(self.experts, -1, A.shape[-1])[rows].flatten(0, 1)
            B = B.reshape(len(B), -1, self.experts)[..., rows].flatten(1)
        elif self.layout in ("transposed", "embedding"):
            A = A[:, rows]
        else:
            B, magnitude = B[rows], magnitude if magnitude is None else magnitude[rows]
        if magnitude is None and value.dtype == A.dtype == B.dtype == widen(A).dtype and self.experts == 1:
            return _add(value, A, B, self.factor, self.layout)
        A, B = (nn.Parameter(widen(one), requires_grad=False) for one in (A, B))
        lengths = None if magnitude is None else nn.Parameter(magnitude, requires_grad=False)
        count = len(value) if self.layout.startswith("experts") else 1
        step = LowRankChange(A, B, self.factor, self.layout, count, magnitude=lengths).eval()
        if magnitude is not None:
            return step(value)  # type: ignore[no-any-return]
        # As PEFT on a CPU: the change is rounded to the precision of A and B, and added in the wider of the two.
        delta = step.delta().to(self.B.dtype).reshape(value.shape)
        return torch.add(value, delta).to(value.dtype)


def _add(value: Tensor, A: Tensor, B: Tensor, factor: float, layout: str) -> Tensor:
    """Add in place, with the rounding of PEFT: it multiplies the product by the factor, and adds."""
    left, right = (A.mT, B.mT) if layout in ("transposed", "embedding") else (B.flatten(1), A.flatten(1))
    rows = value.view(len(value), -1)
    if abs(math.frexp(factor)[0]) == 0.5:  # a power of two rounds nothing: one pass over the value is enough
        rows.addmm_(left, right, alpha=factor)
    else:
        rows.add_((left @ right).mul_(factor))
    return value
