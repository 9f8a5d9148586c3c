"""Adapters that PEFT saved, merged into a base checkpoint one tensor at a time."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.errors import ModelFileError, PlanError, RewriterError
from rewriter.serialization._adapter import CONFIG, adapter_settings
from rewriter.streaming._changes import Adapter, Change, changes_of, merged_rows, misfit
from rewriter.streaming._checkpoint import BLOCK, Checkpoint, open_checkpoint
from rewriter.streaming._dcp import Pieces
from rewriter.streaming._header import Stored, read_header
from rewriter.streaming._layout import Output, Work, shards_of
from rewriter.streaming._output import Written, write_output

WEIGHTS = "adapter_model.safetensors"


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
    settings = adapter_settings(folder / CONFIG, also=("target_parameters",))
    if not (folder / WEIGHTS).is_file():
        raise ModelFileError(f"{folder} has no {WEIGHTS}; save the adapter with a PEFT that writes safetensors")
    return Adapter(folder, weight, settings, read_header(folder / WEIGHTS))


def _work(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> list[Work]:
    changes: dict[str, list[Change]] = defaultdict(list)
    for adapter in adapters:
        for name, change in changes_of(adapter, checkpoint):
            changes[name].append(change)
    problems = [text for name, found in changes.items() for text in _problems(checkpoint, name, found)]
    if problems:
        raise PlanError("\n  ".join([f"the adapters do not fit {checkpoint.path}:", *problems]))
    return [_merging(checkpoint.tensors[name], found) for name, found in changes.items()]


def _problems(checkpoint: Checkpoint, name: str, changes: Sequence[Change]) -> list[str]:
    if name in checkpoint.aliases or name in checkpoint.aliases.values():
        return [f"{name} is tied, and PEFT changes one of its names alone: untie it first"]
    if name.endswith(".*"):
        return [
            f"{name}: {changes[0].adapter.folder} changes parameters of this module (target_parameters), and names and "
            "shapes do not tell which: merge it with PEFT's merge_and_unload()"
        ]
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
    return [f"{name}: {text}" for change in changes for text in [misfit(base, change)] if text]


def _merging(base: Stored, changes: Sequence[Change]) -> Work:
    parts = [stored for change in changes for stored in change.parts.values()]
    whole = isinstance(base, Pieces) or any("lora_magnitude_vector" in change.parts for change in changes)
    return Work(
        base.name,
        [base],
        [base, *parts],
        [Output(base.name, base.dtype, base.shape)],
        lambda: [merged_rows(base, changes)],
        nbytes=-1 if whole else sum(one.nbytes for one in parts) + 4 * BLOCK,
    )
