"""Which chain a state dict was saved from: an entry of its `_metadata`, which adds no key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rewriter.serialization._safetensors import KEY
from rewriter.sites._spec import SiteSpec

_SPEED = re.compile(r"(?:^|, )(?:cache|batch|memory|share|trainable)=\w+")
"""Options that change when a chain is evaluated or trained, and not what its stored tensors mean."""


def identity(record: SiteSpec) -> dict[str, Any] | None:
    """Return what a state dict says about a site; `None` for an absorbed one, whose arguments are unknown.

    Values are strings and lists of strings, so that ``torch.load(weights_only=True)`` reads them.
    """
    if record.rule.startswith("absorbed:"):
        return None
    options, separator, settings = record.options.partition("settings=")
    return {"chain": list(record.chain), "options": _SPEED.sub("", options).strip(", ") + separator + settings}


def note_identity(record: SiteSpec, state: Any, prefix: str) -> None:
    """Write the identity of a site into the metadata of a state dict that is being made.

    Arguments:
        record: of the site.
        state: the state dict.
        prefix: of the site's keys.
    """
    own, metadata = identity(record), getattr(state, "_metadata", {}).get(prefix[:-1])
    if own is not None and metadata is not None:
        metadata[KEY] = own


def difference(name: str, record: SiteSpec, metadata: Mapping[str, Any]) -> str:
    """Return why a state with this metadata is not for the site called `name`; empty if it may be.

    Arguments:
        name: the tensor that the site computes, as the state dict names it.
        record: of the site.
        metadata: of the site, from the state dict.
    """
    own, found = identity(record), metadata.get(KEY)
    if own is None or not isinstance(found, Mapping) or dict(found) == own:
        return ""
    return (
        f"{name}: the state was saved from the chain {printed(found)}, and the model computes {printed(own)}. Rewrite "
        "the model with the chain of the state, or change its arguments with rewriter.state.update; "
        "rewriter.state.convert_state_dict(state, model_of_the_state, to='plain') gives plain values"
    )


def printed(found: Mapping[str, Any]) -> str:
    """Return an identity as text: the steps, then the options."""
    steps = found.get("chain")
    chain = " >> ".join(map(str, steps)) if isinstance(steps, list) else str(steps)
    return f"{chain} ({found['options']})" if found.get("options") else chain
