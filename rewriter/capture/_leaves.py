"""torch.nn's own modules as functions of their tensors.

An opener says, for one module class, which function computes the module's forward and with which arguments. The
call's own arguments come first and in the order of the module's forward, so that baking can put the call back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rewriter.runtime import plain_class


@dataclass(frozen=True)
class Own:
    """An argument that is an attribute of the module, read when the graph runs: a tensor, or ``training``."""

    name: str


@dataclass(frozen=True)
class Opened:
    """A call of a module, as a function's.

    Arguments:
        function: what to call.
        arguments: of the call after the forward's own; `Own` for what belongs to the module.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


Opener = Callable[[Any], Opened]
_openers: dict[type[nn.Module], Opener] = {}


def opens(*kinds: type[nn.Module]) -> Callable[[Opener], Opener]:
    """Register an opener for exactly these classes; a subclass may have another forward."""

    def bind(opener: Opener) -> Opener:
        _openers.update(dict.fromkeys(kinds, opener))
        return opener

    return bind


def opener_of(module: nn.Module) -> Opener | None:
    """Return the opener for a module, if there is one."""
    from rewriter.capture import _openers as _  # noqa: F401  (registers them)

    return _openers.get(plain_class(module))


def bind_call(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call of `module` in the order of its forward, defaults filled in."""
    signature = inspect.signature(plain_class(module).forward)
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())[1:]
