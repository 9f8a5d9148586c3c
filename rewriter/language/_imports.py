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
        if prefix == "torch":
            problems.append(
                Problem(("imports", prefix), "the prefix 'torch' means torch", "choose another", on_key=True)
            )
        elif isinstance(name, str) and all(part.isidentifier() for part in name.split(".")):
            found = _import(name, allowed)
            if isinstance(found, ModuleType):
                modules[prefix] = found
            else:
                problems.append(Problem(("imports", prefix), *found))
    return modules, problems


def _import(name: str, allowed: Collection[str] | None) -> ModuleType | tuple[str, str]:
    """Import a module, or say why not and what to do."""
    package = name.partition(".")[0]
    if not _may_run(name, allowed):
        return f"importing {name!r} runs its code, which was not allowed", f"add --allow-import {package}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name is not None and f"{name}.".startswith(f"{missing.name}."):
            return f"there is no module {missing.name!r}", "install it, or put its folder on PYTHONPATH"
        return f"importing {name!r} failed: {missing}", ""
    # Whatever the user's module does when it is imported, sys.exit() included, is a problem of this line.
    except (Exception, SystemExit) as wrong:
        return f"importing {name!r} failed: {type(wrong).__name__}: {wrong}", ""


def _may_run(name: str, allowed: Collection[str] | None) -> bool:
    if allowed is None:
        return True
    names = {allowed} if isinstance(allowed, str) else set(allowed)
    parts = name.split(".")
    return any(".".join(parts[:length]) in names for length in range(1, len(parts) + 1))
