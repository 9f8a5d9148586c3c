"""The state of a rewritten model: values, state dicts and optimizers."""

from __future__ import annotations

from rewriter._optimizers import check_optimizer, named_sites
from rewriter._remap import remap_optimizer
from rewriter.state._convert import convert_state_dict
from rewriter.state._extend import extend
from rewriter.state._update import update
from rewriter.state._values import freeze, get_value, invalidate, set_value, unfreeze

__all__ = [
    "check_optimizer",
    "convert_state_dict",
    "extend",
    "freeze",
    "get_value",
    "invalidate",
    "named_sites",
    "remap_optimizer",
    "set_value",
    "unfreeze",
    "update",
]
