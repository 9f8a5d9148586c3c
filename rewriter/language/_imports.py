"""Import the Python modules that a spec names, if they may be imported."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from types import ModuleType
from typing import Any

from rewriter.language._problems import Problem


def import_modules(data: Any, allowed: Collection[str] | None) -> tuple[dict[str, ModuleType], list[Problem]]:
    """Return the modules of ``imports:`` by prefix, and why others are missing.

    Arguments:
        data: the spec's plain values, which need not be correct.
        allowed: packages and modules whose code may run, with everything inside them; ``None`` for all.
    """
    imports = data.get("imports") if isinstance(data, dict) else None
    modules: dict[str, ModuleType] = {}
    problems: list[Problem] = []
    for prefix, name in imports.items() if isinstance(imports, dict) else ():
        path = ("imports", prefix)
        if prefix == "torch":
            problems.append(Problem(path, "the prefix 'torch' means torch", "choose another", on_key=True))
        elif isinstance(name, str) and all(part.isidentifier() for part in name.split(".")):
            try:
                modules[prefix] = _import(name, allowed)
            except _Refused as refused:
                problems.append(Problem(path, *refused.args))
    return modules, problems


class _Refused(Exception):
    """A module that is not imported: why, and what to do."""


def _import(name: str, allowed: Collection[str] | None) -> ModuleType:
    names = [allowed] if isinstance(allowed, str) else allowed
    if names is not None and not any(f"{name}.".startswith(f"{other}.") for other in names):
        hint = f"add --allow-import {name.partition('.')[0]}"
        raise _Refused(f"importing {name!r} runs its code, which was not allowed", hint)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name is not None and f"{name}.".startswith(f"{missing.name}."):
            hint = "install it, or put its folder on PYTHONPATH"
            raise _Refused(f"there is no module {missing.name!r}", hint) from missing
        raise _Refused(f"importing {name!r} failed: {missing}") from missing
    # Whatever the user's module does when it is imported, sys.exit() included, is a problem of this line.
    except (Exception, SystemExit) as wrong:
        raise _Refused(f"importing {name!r} failed: {type(wrong).__name__}: {wrong}") from wrong
