"""Weights as safetensors: the header also says from which chains they were saved."""

from __future__ import annotations

import importlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rewriter.errors import ModelFileError

KEY = "reparam"
"""The entry of a site's metadata in a state dict, and of the header, that holds the identity of a chain."""


def header_of(model: nn.Module) -> dict[str, str]:
    """Return the metadata for the header of a file with the weights of `model`."""
    metadata: Mapping[str, Any] = getattr(model.state_dict(), "_metadata", {})
    chains = {path: entry[KEY] for path, entry in metadata.items() if KEY in entry}
    return {"format": "pt", **({KEY: json.dumps(chains)} if chains else {})}


def read_safetensors(path: Path) -> OrderedDict[str, Tensor]:
    """Return the weights of a file as a state dict, with the identities of chains in its metadata.

    Raises:
        ModelFileError: it cannot be read, or safetensors is not installed.
    """
    try:
        safetensors: Any = importlib.import_module("safetensors")
    except ImportError:
        raise ModelFileError(f"reading {path} needs safetensors (pip install safetensors)") from None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            state: OrderedDict[str, Tensor] = OrderedDict((name, file.get_tensor(name)) for name in names)
            header = file.metadata() or {}
        chains = json.loads(header.get(KEY, "{}"))
        metadata = {str(place): {KEY: identity} for place, identity in dict(chains).items()}
    except Exception as problem:
        raise ModelFileError(f"{path} cannot be read as safetensors: {problem}") from problem
    state._metadata = metadata  # type: ignore[attr-defined]
    return state
