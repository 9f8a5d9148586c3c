"""torch.nn's own modules as functions of their tensors.

An opener says, for one module class, which function computes the module's forward and with which arguments. The
call's own arguments come first and in the order of the module's forward, so that baking can put the call back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rewriter.sites import plain_class, sites_of
from rewriter.sites._places import CONTAINER


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

    @functools.cached_property
    def names(self) -> set[str]:
        """The module's own attributes that the function reads."""
        return {argument.name for argument in _flat(self.arguments) if isinstance(argument, Own)}


def _flat(arguments: Iterable[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, (tuple, list)):
            yield from _flat(argument)
        else:
            yield argument


Opener = Callable[[Any], "Opened | None"]
_openers: dict[type[nn.Module], Opener] = {}


def opens(*kinds: type[nn.Module]) -> Callable[[Opener], Opener]:
    """Register an opener for exactly these classes; a subclass may have another forward.

    The opener returns None for a module that was built another way than its class builds it.
    """

    def bind(opener: Opener) -> Opener:
        _openers.update(dict.fromkeys(kinds, opener))
        return opener

    return bind


@functools.cache  # an import statement looks the module up each time
def register_leaves() -> None:
    """Make the openers and expanders known."""
    from rewriter.capture import leaves as _  # noqa: F401


def opener_of(module: nn.Module) -> Opener | None:
    """Return the opener for a module, if there is one: the module runs the forward of its class."""
    register_leaves()

    return None if has_own_forward(module) else _openers.get(plain_class(module))


def has_own_forward(module: nn.Module) -> bool:
    """Say whether the module's forward was replaced on the object itself."""
    return "forward" in vars(module)


def opens_up(module: nn.Module, tensor: str) -> bool:
    """Say whether the opened module is a function of the tensor that it, or a submodule of it, has by that name."""
    opener = opener_of(module)
    opened = opener(module) if opener is not None else None
    return opened is not None and tensor in opened.names


def reads_every_site(module: nn.Module, opened: Opened) -> bool:
    """Say whether all computed tensors at and below `module`, of which there are some, are arguments of `opened`."""
    computed = set(_computed(module, ""))
    return bool(computed) and computed <= opened.names


def _computed(module: nn.Module, prefix: str) -> Iterator[str]:
    for tensor in sites_of(module):
        yield prefix + tensor
    for name, child in module._modules.items():
        if child is not None and name != CONTAINER:
            yield from _computed(child, f"{prefix}{name}.")


@functools.lru_cache(maxsize=1024)
def _signature_of(forward: Any) -> tuple[inspect.Signature, bool]:
    """Return the signature, and whether all its parameters can be given by position, one each."""
    signature = inspect.signature(forward)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    return signature, all(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)


def bind_call(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call of `module` in the order of its forward, defaults filled in."""
    signature, plain = _signature_of(plain_class(module).forward)
    if plain and not kwargs and len(args) == len(signature.parameters) - 1:
        return tuple(args)
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())[1:]
