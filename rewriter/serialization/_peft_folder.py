"""PEFT's names for the tensors of a LoRA adapter, and the scale of its changes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

PREFIX = "base_model.model."
_PART = re.compile(r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?")


def sorted_parts(state: Mapping[str, T]) -> tuple[dict[str, dict[str, T]], dict[str, T]]:
    """Return the parts of each layer's change, by the layer's path, and the other tensors, by the base model's names.

    >>> sorted_parts({"base_model.model.fc.lora_A.weight": 1, "base_model.model.head.weight": 2})
    ({'fc': {'lora_A': 1}}, {'head.weight': 2})
    """
    changes: dict[str, dict[str, T]] = {}
    others: dict[str, T] = {}
    for key, value in state.items():
        name = key.removeprefix(PREFIX)
        found = _PART.fullmatch(name)
        if found is None:
            others[name.replace(".base_layer.", ".")] = value
        else:
            changes.setdefault(found[1], {})[found[2]] = value
    return changes, others


def alpha(path: str, settings: Mapping[str, Any]) -> float:
    """Return the setting `lora_alpha` of the layer at `path`.

    >>> alpha("block.fc", {"lora_alpha": 8, "alpha_pattern": {"fc": 2}}), alpha("head", {"lora_alpha": 8})
    (2, 8)
    """
    for pattern, other in (settings.get("alpha_pattern") or {}).items():
        if path == pattern.removeprefix("^") or path.endswith(f".{pattern}"):
            return other  # type: ignore[no-any-return]
    return settings.get("lora_alpha", 8)  # type: ignore[no-any-return]


def scale(path: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Return the factor of the product of B and A in the layer at `path`.

    >>> scale("block.fc", 4, {"lora_alpha": 8, "alpha_pattern": {"fc": 2}})
    0.5
    """
    return float(alpha(path, settings)) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
