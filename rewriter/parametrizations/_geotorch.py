"""What ``geotorch.*`` means in a spec: geotorch's own classes, computed in at least float32."""

from __future__ import annotations

from typing import Any

import geotorch
from torch import nn

from rewriter.parametrizations._foreign import Widened, WidenedBothWays

_classes: dict[type[nn.Module], type[nn.Module]] = {}


def __getattr__(name: str) -> Any:
    if name.startswith("_") or not hasattr(geotorch, name):
        raise AttributeError(f"geotorch has no attribute {name!r}")
    found = getattr(geotorch, name)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        return found
    if found not in _classes:
        body = {"__module__": __name__, "__qualname__": name, "__doc__": found.__doc__}
        base = WidenedBothWays if hasattr(found, "right_inverse") else Widened
        _classes[found] = type(name, (base, found), body)
    return _classes[found]


def __dir__() -> list[str]:
    return [name for name in dir(geotorch) if not name.startswith("_")]
