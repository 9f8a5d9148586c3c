"""State dicts of the plain model, loaded into one that is rewritten: an error that says what to do instead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rewriter.sites._site import ParametrizedTensor


def explained(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return `load_state_dict` with an explanation in its error where the state has the value of a computed tensor."""

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, state_dict, *args, **kwargs)
        except RuntimeError as problem:
            name = _plain_value(self, state_dict)
            if name is None:
                raise
            raise RuntimeError(
                f"{problem}\n\tThe state is that of the plain model: {name} is computed here. Load it into the model "
                "before it is rewritten, or assign its tensors one by one with rewriter.state.set_value."
            ) from None

    return load_state_dict


def _plain_value(model: nn.Module, state: Any) -> str | None:
    if not isinstance(state, Mapping):
        return None
    sites = (site for site in model.modules() if isinstance(site, ParametrizedTensor))
    return next((name for site in sites for name in site.record.names if name in state), None)
