"""Training checkpoints: which entry is the model, and the prefixes that wrappers add to its names."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from rewriter._given import kind_of
from rewriter.errors import ModelFileError

_KEYS = ("state_dict", "model_state_dict", "model")
_WRAPPERS = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}


def entry_of(path: Path, loaded: Any, key: str) -> Any:
    """Return the entry of a training checkpoint.

    Raises:
        ModelFileError: there is no such entry.
    """
    if not isinstance(loaded, Mapping) or key not in loaded:
        has = f"its keys are {_listed(loaded)}" if isinstance(loaded, Mapping) else f"it holds {kind_of(loaded)}"
        raise ModelFileError(f"{path} has no entry {key!r}; {has}")
    return loaded[key]


def weights_of(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    """Return the state dict in what a file contains: the whole of it, or its one entry that is a state dict.

    Raises:
        ModelFileError: there is none, or more than one.
    """
    if isinstance(loaded, torch.Tensor):
        raise ModelFileError(f"{path} holds a single tensor, not a model")
    if not isinstance(loaded, Mapping):
        raise ModelFileError(f"{path} holds {kind_of(loaded)}, not a model")
    # An extra state belongs to the state dict around it.
    found = [key for key, value in loaded.items() if _is_state_dict(value) and not str(key).endswith("_extra_state")]
    usual = [key for key in _KEYS if key in found]
    if usual or len(found) == 1:
        return cast("dict[str, torch.Tensor]", loaded[(usual or found)[0]])
    if found:
        raise ModelFileError(f"{path} holds several state dicts: {_listed(found)}; choose one with --key")
    if _is_state_dict(loaded):
        return cast("dict[str, torch.Tensor]", loaded)
    raise ModelFileError(f"{path} holds a dict with the keys {_listed(loaded)}, which is no state dict")


def without_count(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the entry ``n_averaged`` that `torch.optim.swa_utils.AveragedModel` adds.

    >>> without_count({"module.fc.weight": 1, "n_averaged": 2}), without_count({"fc.weight": 1, "n_averaged": 2})
    ({'module.fc.weight': 1}, {'fc.weight': 1, 'n_averaged': 2})
    """
    rest = {key: value for key, value in state.items() if key != "n_averaged"}
    return rest if all(str(key).startswith("module.") for key in rest) else dict(state)


def without_prefixes(weights: Mapping[str, torch.Tensor], names: Collection[str]) -> OrderedDict[str, torch.Tensor]:
    """Return the weights under names without the prefixes of wrappers; warn if there were any.

    The metadata of a state dict stays, under the paths without the prefixes.

    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     list(without_prefixes({"module.fc.weight": torch.ones(1)}, ["fc.weight"]))
    ['fc.weight']

    Arguments:
        names: the state-dict keys of the model. A segment of one of them is no prefix.
    """
    metadata = getattr(weights, "_metadata", {})
    weights = weights if "n_averaged" in names else without_count(weights)
    own = {segment for name in names for segment in name.split(".")}
    wrappers = {prefix[:-1]: prefix for prefix in _WRAPPERS if prefix[:-1] not in own}

    def shortened(name: str) -> str:
        return ".".join(segment for segment in name.split(".") if segment not in wrappers)

    if len(set(map(shortened, weights))) < len(weights):
        wrappers = {}  # two tensors would have one name
    renamed = OrderedDict((shortened(name), tensor) for name, tensor in weights.items())
    renamed._metadata = {  # type: ignore[attr-defined]
        shortened(path): entry
        for path, entry in (metadata.items() if isinstance(metadata, Mapping) else ())
        if isinstance(path, str) and isinstance(entry, Mapping)
    }
    for segment, prefix in wrappers.items():
        count = sum(segment in name.split(".") for name in weights)
        if count:
            what = "1 name" if count == 1 else f"{count} names"
            warnings.warn(f"removed the prefix {prefix!r} of {_WRAPPERS[prefix]} from {what}", stacklevel=2)
    return renamed


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(key, str) for key in value) and any(isinstance(item, torch.Tensor) for item in value.values())


def _listed(keys: Collection[Any]) -> str:
    shown = ", ".join(repr(key) for key in list(keys)[:8])
    return shown + (", …" if len(keys) > 8 else "")
