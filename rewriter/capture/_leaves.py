"""torch.nn's own modules as functions of their tensors.

An opener says, for one module class, which function computes the module's forward and with which arguments. The
call's own arguments come first and in the order of the module's forward, so that baking can put the call back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx.node import map_aggregate

from rewriter.runtime import plain_class, sites_of


@dataclass(frozen=True)
class Own:
    """An argument that is an attribute of the module, read when the graph runs: a tensor, or ``training``.

    Arguments:
        name: the attribute; dotted for one of a submodule.
    """

    name: str


@dataclass(frozen=True)
class Opened:
    """A call of a module, as a function's.

    Arguments:
        function: what to call.
        arguments: of the call after the forward's own; `Own`, also inside a list, for what belongs to the module.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def names(self) -> set[str]:
        """The module's own attributes that the function reads."""
        found: set[str] = set()
        map_aggregate(self.arguments, lambda value: found.add(value.name) if isinstance(value, Own) else None)
        return found


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
    from rewriter.capture import leaves as _  # noqa: F401  (registers them)

    return _openers.get(plain_class(module))


def opens_up(module: nn.Module, tensor: str) -> bool:
    """Say whether the opened module is a function of the tensor that it, or a submodule of it, has by that name."""
    opener = opener_of(module)
    return opener is not None and tensor in opener(module).names


def reads_every_site(module: nn.Module, opened: Opened) -> bool:
    """Say whether all computed tensors at and below `module`, of which there are some, are arguments of `opened`."""
    computed = {
        f"{path}.{tensor}" if path else tensor
        for path, owner in module.named_modules(remove_duplicate=False)
        for tensor in sites_of(owner)
    }
    return bool(computed) and computed <= opened.names


@functools.lru_cache(maxsize=1024)
def _signature_of(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def bind_call(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call of `module` in the order of its forward, defaults filled in."""
    signature = _signature_of(plain_class(module).forward)
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())[1:]
