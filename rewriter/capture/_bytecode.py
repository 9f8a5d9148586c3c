"""What a forward's code asks of its variables, where nothing can be put in the way: ``value is None``."""

from __future__ import annotations

import dis
import functools
import sys
from types import CodeType, FrameType


@functools.lru_cache(maxsize=4096)
def asked_for_none(code: CodeType) -> frozenset[str]:
    """Return the local variables that the code compares with None.

    >>> def forward(x, mask):
    ...     return x if mask is None else x * mask
    >>> sorted(asked_for_none(forward.__code__))
    ['mask']
    """
    found: set[str] = set()
    steps = list(dis.get_instructions(code))
    for index, step in enumerate(steps):
        if "IF_NONE" in step.opname or "IF_NOT_NONE" in step.opname:
            found.update(_loaded(steps[index - 1]))
        elif step.opname == "IS_OP" and steps[index - 1].opname == "LOAD_CONST" and steps[index - 1].argval is None:
            found.update(_loaded(steps[index - 2]))
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def _assigned(code: CodeType) -> dict[int, tuple[str, ...]]:
    """Return for the offset of each call the local variables that take its result, unpacked or whole."""
    found: dict[int, tuple[str, ...]] = {}
    steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    for index, step in enumerate(steps):
        if step.opname.startswith("CALL"):
            names: list[str] = []
            for after in steps[index + 1 :]:
                if after.opname.startswith("STORE_FAST"):
                    names += _names(after.argval)[:1] if "LOAD" in after.opname else _names(after.argval)
                elif not after.opname.startswith("UNPACK"):
                    break
            found[step.offset] = tuple(names)
    return found


def asks_of_result() -> str | None:
    """Return the variable that takes the result of the call now running and is compared with None, if there is one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    asked = asked_for_none(frame.f_code)
    return next((name for name in _assigned(frame.f_code).get(frame.f_lasti, ()) if name in asked), None)


def _loaded(step: dis.Instruction) -> list[str]:
    return _names(step.argval)[-1:] if step.opname.startswith(("LOAD_FAST", "STORE_FAST_LOAD")) else []


def _names(value: object) -> list[str]:
    return [str(name) for name in value] if isinstance(value, tuple) else [str(value)]


@functools.lru_cache(maxsize=4096)
def _is_ours(filename: str) -> bool:
    return "/torch/" in filename.replace("\\", "/") or filename.startswith(_PACKAGE)


_PACKAGE = __file__.rpartition("capture")[0]
