"""Model files that a script saved: their classes are in the module ``__main__``, which is another one now."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rewriter.errors import ModelFileError

Factory = str | Callable[[], Any] | None


@contextlib.contextmanager
def script_of(path: Path, factory: str | None) -> Iterator[tuple[Factory, list[str]]]:
    """Import the script of ``--model script.py:Net``; yield the factory for weights, and the classes to allow.

    While the context is open, ``__main__`` has the module classes of the script that the file asks for.

    Raises:
        ModelFileError: the script cannot be imported, or the file needs one and no script is named.
    """
    asked, main = _names_in(path), sys.modules["__main__"]
    file, colon, name = (factory or "").rpartition(":")
    if not colon or not file.endswith(".py"):
        saved = [known for known in asked if known.startswith("__main__.") and not hasattr(main, known[9:])]
        if saved:
            raise ModelFileError(
                f"{path} was saved from a script that defines {', '.join(saved)}: "
                f"name the file of the script, --model script.py:{saved[0].partition('.')[2]}"
            )
        yield factory, []
        return
    script = _import_script(Path(file))
    made = getattr(script, name, None)
    if not callable(made):
        near = difflib.get_close_matches(name, vars(script), n=1)
        raise ModelFileError(f"{file} has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    classes = _module_classes(script)
    needed = [known for known in asked if known.rpartition(".")[0] in ("__main__", script.__name__)]
    allowed = [known for known in needed if known.rpartition(".")[2] in classes]
    added = {known.rpartition(".")[2] for known in allowed if known.startswith("__main__.")} - vars(main).keys()
    for known in added:
        setattr(main, known, classes[known])
    try:
        # Another name of each class is its name in the script.
        yield None if allowed else made, [*allowed, *(f"{script.__name__}.{cls.__name__}" for cls in classes.values())]
    finally:
        for known in added:
            delattr(main, known)


def _names_in(path: Path) -> list[str]:
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # Another format, or damaged: reading the file gives the reason.
        return []


def _import_script(path: Path) -> ModuleType:
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and Path(getattr(known, "__file__", None) or "") == path.resolve():
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if known is not None or spec is None or spec.loader is None:
        raise ModelFileError(f"{path} cannot be imported: its name {name!r} is the name of another module; rename it")
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script
    try:
        spec.loader.exec_module(script)
    except BaseException as problem:
        del sys.modules[name]
        if isinstance(problem, OSError):
            raise ModelFileError(f"{path} cannot be read: {problem.strerror}") from problem
        raise
    return script


def _module_classes(script: ModuleType) -> dict[str, type]:
    from torch import nn

    return {
        name: value for name, value in vars(script).items() if isinstance(value, type) and issubclass(value, nn.Module)
    }
