"""Adapters that PEFT saved, merged into a base checkpoint one tensor at a time."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.absorbing import LowRankChange
from rewriter.errors import ModelFileError, PlanError, RewriterError
from rewriter.parametrizations.maths._precision import widen
from rewriter.serialization._adapter import CONFIG, adapter_settings
from rewriter.serialization._peft_folder import scale, sorted_parts
from rewriter.streaming._checkpoint import Checkpoint, open_checkpoint, read_tensor
from rewriter.streaming._header import Header, Stored, read_header
from rewriter.streaming._layout import Output, Work, shards_of
from rewriter.streaming._output import Written, write_output

WEIGHTS = "adapter_model.safetensors"


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
        path: of the layer.
        parts: its tensors, by PEFT's names; the one name ``""`` for a tensor that replaces the base's.
    """

    adapter: Adapter
    path: str
    parts: Mapping[str, Stored]

    @property
    def replaces(self) -> bool:
        """Whether the tensor takes the place of the base's."""
        return "" in self.parts


@dataclass(frozen=True)
class Merged:
    """What was merged.

    Arguments:
        names: of the tensors that changed.
        written: the files.
    """

    names: list[str]
    written: Written


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    **how: Any,
) -> Merged:
    """Write a base checkpoint with the changes of PEFT adapters added: W + Σ weight · scale · B A.

    Arguments:
        base: a safetensors file, a shard index, or a folder.
        adapters: folders that PEFT's ``save_pretrained`` wrote. LoRA, rsLoRA, DoRA and `modules_to_save` are merged.
        output: a file for a file, a folder for anything else.
        weights: a factor for each adapter; 1 without.
        how: `force`, `resume`, `workers` and `report`, see `write_output`.

    Raises:
        ModelFileError: a file is damaged, or an adapter is of another kind.
        PlanError: an adapter does not fit the base, or two adapters do not go together.
    """
    factors = [1.0] * len(adapters) if weights is None else list(weights)
    if len(factors) != len(adapters) or not adapters:
        raise RewriterError(f"there are {len(adapters)} adapters and {len(factors)} weights; give one weight for each")
    checkpoint = open_checkpoint(Path(base))
    read = [_adapter(Path(folder), weight) for folder, weight in zip(adapters, factors, strict=True)]
    work = _work(checkpoint, read)
    files = [[str(one.header.file), one.header.size, one.header.file.stat().st_mtime_ns] for one in read]
    job = {"verb": "merge", "adapters": files, "settings": [one.settings for one in read], "weights": factors}
    written = write_output(checkpoint, shards_of(checkpoint, work), Path(output), job, **how)
    return Merged([one.name for one in work], written)


def _adapter(folder: Path, weight: float) -> Adapter:
    if not (folder / CONFIG).is_file():
        raise ModelFileError(f"{folder} is no folder that PEFT's save_pretrained wrote: it has no {CONFIG}")
    settings = adapter_settings(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise ModelFileError(f"{folder} has no {WEIGHTS}; save the adapter with a PEFT that writes safetensors")
    return Adapter(folder, weight, settings, read_header(folder / WEIGHTS))


def _work(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> list[Work]:
    changes: dict[str, list[Change]] = defaultdict(list)
    for adapter in adapters:
        layers, others = sorted_parts({stored.name: stored for stored in adapter.header.tensors})
        for name, stored in others.items():
            changes[name].append(Change(adapter, name.rpartition(".")[0], {"": stored}))
        for path, parts in layers.items():
            changes[f"{path}.weight"].append(Change(adapter, path, parts))
    problems = [text for name, found in changes.items() for text in _problems(checkpoint, name, found)]
    if problems:
        raise PlanError("\n  ".join([f"the adapters do not fit {checkpoint.path}:", *problems]))
    return [_merging(checkpoint.tensors[name], found) for name, found in changes.items()]


def _problems(checkpoint: Checkpoint, name: str, changes: Sequence[Change]) -> list[str]:
    if name in checkpoint.aliases or name in checkpoint.aliases.values():
        return [f"{name} is tied, and PEFT changes one of its names alone: untie it first"]
    if name not in checkpoint.tensors:
        return [f"{name}: {changes[0].adapter.folder} changes it, and the base has no such tensor"]
    alone = [change for change in changes if change.replaces or "lora_magnitude_vector" in change.parts]
    for change in alone:
        what = "replaces it (modules_to_save)" if change.replaces else "sets its lengths (DoRA)"
        if change.adapter.weight != 1:
            return [f"{name}: {change.adapter.folder} {what}, which has no weight {change.adapter.weight:g}; use 1"]
        others = [other for other in changes if other.adapter is not change.adapter]
        if others:
            return [f"{name}: {change.adapter.folder} {what}, and {others[0].adapter.folder} changes it too"]
    base = checkpoint.tensors[name]
    return [f"{name}: {text}" for change in changes for text in [_misfit(base, change)] if text]


def _misfit(base: Stored, change: Change) -> str:
    if not base.dtype.is_floating_point or base.dtype.itemsize < 2:
        return f"the base has {base.dtype}, to which nothing can be added: merge into the weights it was quantized from"
    if change.replaces:
        shape = change.parts[""].shape
        return "" if shape == base.shape else f"the adapter has {list(shape)}, and the base {list(base.shape)}"
    if not ({"lora_A", "lora_B"} <= change.parts.keys() or {"lora_embedding_A", "lora_embedding_B"} == {*change.parts}):
        return f"the adapter has only {', '.join(sorted(change.parts))} for it"
    wanted = ("lora_A", "lora_B") if "lora_A" in change.parts else ("lora_embedding_A", "lora_embedding_B")
    A, B = (change.parts[part].shape for part in wanted)
    if len(A) < 2 or len(B) < 2 or A[0] != B[1] or not _layout(base.shape, change):
        return f"the adapter has A {list(A)} and B {list(B)}, and the base {list(base.shape)}"
    return ""


def _layout(shape: tuple[int, ...], change: Change) -> str:
    """Return the layout of `LowRankChange` in which A and B have the shape of the base; empty for none."""
    if "lora_embedding_A" in change.parts:
        A, B = change.parts["lora_embedding_A"].shape, change.parts["lora_embedding_B"].shape
        return "embedding" if shape == (A[1], B[0]) else ""
    A, B = change.parts["lora_A"].shape, change.parts["lora_B"].shape
    if len(shape) > 2:
        return "conv" if shape == (B[0], *A[1:]) else ""
    fitting = {"linear": shape == (B[0], A[1]), "transposed": shape == (A[1], B[0])}
    likely = "transposed" if change.adapter.settings.get("fan_in_fan_out") else "linear"
    return likely if fitting[likely] else next((layout for layout, fits in fitting.items() if fits), "")


def _merging(base: Stored, changes: Sequence[Change]) -> Work:
    ordered = sorted(changes, key=lambda change: not change.replaces)
    reads = [base, *(stored for change in ordered for stored in change.parts.values())]

    def run() -> list[Tensor]:
        value = read_tensor(base)
        for change in ordered:
            value = _changed(value, change)
        return [value]

    return Work(base.name, [base], reads, [Output(base.name, base.dtype, base.shape)], run)


def _changed(value: Tensor, change: Change) -> Tensor:
    parts = {part: read_tensor(stored) for part, stored in change.parts.items()}
    if change.replaces:
        return parts[""].to(value.dtype)
    A, B, *magnitude = (parts[part] for part in sorted(parts))
    factor = scale(change.path, A.shape[0], change.adapter.settings) * change.adapter.weight
    frozen = [nn.Parameter(widen(one), requires_grad=False) for one in (A, B)]
    lengths = nn.Parameter(magnitude[0], requires_grad=False) if magnitude else None
    step = LowRankChange(frozen[0], frozen[1], factor, _layout(tuple(value.shape), change), magnitude=lengths).eval()
    if magnitude:
        return step(value)  # type: ignore[no-any-return]
    # As PEFT on a CPU: the change is rounded to the precision of A and B, and added in the wider of the two.
    delta = step.delta().to(B.dtype).reshape(value.shape)
    return torch.add(value, delta).to(value.dtype)
