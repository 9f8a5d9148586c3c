"""Adapter folders of PEFT: the tensors of the adapter as a state dict, with its settings in the metadata."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rewriter.errors import ModelFileError, printable

CONFIG = "adapter_config.json"
SETTINGS = "peft"
"""The entry of the root's metadata that holds what the file of the settings says."""

_USED = frozenset("r lora_alpha rank_pattern alpha_pattern use_rslora use_dora init_lora_weights".split())
_NO_MATTER = frozenset(
    "auto_mapping base_model_name_or_path bias corda_config eva_config exclude_modules fan_in_fan_out inference_mode "
    "layers_pattern layers_to_transform lora_dropout lora_ga_config loftq_config megatron_core modules_to_save "
    "peft_type peft_version qalora_group_size revision runtime_config target_modules task_type".split()
)
"""Settings that do not change what trained tensors mean, or only together with a start that is refused."""

_REMEDY = "merge it with PEFT's merge_and_unload() and load the merged weights"


def is_adapter(path: Path) -> bool:
    """Whether `path` is a folder in which PEFT saved an adapter."""
    return os.path.isfile(os.path.join(path, CONFIG))


def read_adapter_with(read: Callable[[Path], Mapping[str, Tensor]], path: Path) -> OrderedDict[str, Tensor]:
    """Return the tensors of an adapter folder as a state dict with PEFT's keys.

    Arguments:
        read: reads the file of the weights.
        path: the folder.

    Raises:
        ModelFileError: a file is missing or damaged, or the adapter is of a kind that no step computes.
    """
    if not is_adapter(path):
        raise ModelFileError(f"{path} is no folder that PEFT's save_pretrained wrote: it has no {CONFIG}")
    settings = adapter_settings(path / CONFIG)
    files = [path / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ModelFileError(f"{path} has no {files[0].name}, in which PEFT saves an adapter's weights")
    state: OrderedDict[str, Tensor] = OrderedDict(read(found))
    state._metadata = {"": {SETTINGS: settings}}  # type: ignore[attr-defined]
    return state


def adapter_settings(path: Path, also: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the settings file of an adapter says.

    Arguments:
        path: the file.
        also: further settings that the caller understands.

    Raises:
        ModelFileError: it is missing or damaged, or the adapter is of a kind that no step computes.
    """
    try:
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelFileError(f"{path} cannot be read as JSON: {problem}") from problem
    if not isinstance(settings, dict):
        raise ModelFileError(f"{path} holds no settings of an adapter, but {printable(repr(settings))[:100]}")
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ModelFileError(
            f"{path}: peft_type is {printable(repr(kind))[:100]}; reparam loads 'LORA' (LoRA, rsLoRA, DoRA): {_REMEDY}"
        )
    unknown = [key for key, value in settings.items() if value and key not in {*_USED, *_NO_MATTER, *also}]
    if unknown:
        shown = ", ".join(f"{printable(key)}={printable(repr(settings[key]))[:60]}" for key in unknown)
        raise ModelFileError(f"{path}: {shown} changes what the layers compute, and no step does that: {_REMEDY}")
    patterns: Any = settings.get("alpha_pattern") or {}
    numbers = [settings.get("r", 8), settings.get("lora_alpha", 8)]
    if isinstance(patterns, dict):
        numbers += patterns.values()
    if not isinstance(patterns, dict) or not all(type(number) in (int, float) for number in numbers):
        raise ModelFileError(f"{path} is damaged: r, lora_alpha and the values of alpha_pattern are numbers")
    for pattern in patterns:
        if not re.fullmatch(r"\^?[\w.]+", pattern):  # a regular expression from a file could run for years
            raise ModelFileError(
                f"{path}: alpha_pattern has the regular expression {printable(repr(pattern))[:80]}; write the names of "
                "the modules"
            )
    return {**settings, "alpha_pattern": patterns}
