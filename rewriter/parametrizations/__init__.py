"""The catalog: one family of parametrizations a file.

The classes are attributes of this package (``rewriter.parametrizations.Orthogonal``); the first use imports their
files. So importing `_registry` alone stays cheap.
"""

from __future__ import annotations

from typing import Any

from rewriter.parametrizations import _registry
from rewriter.parametrizations._describe import Entry as Entry
from rewriter.parametrizations._describe import describe as describe


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for member in map(_registry.find, _registry.names()):
            if member.__module__.startswith(f"{__name__}.") and member.__name__ == name:
                return member
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
