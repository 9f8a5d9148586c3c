"""torch.nn's modules that call other modules, as those calls.

An expander says, for one module class, what the module's forward does: an entry, which is a function of the call's
arguments, and then calls of the module's parts. The entry takes the call's own arguments first and in the order of the
module's forward, so that baking can put the call back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from rewriter.capture._leaves import register_leaves
from rewriter.sites import plain_class, sites_of
from rewriter.sites._hooks import has_hooks


class Parts:
    """Writes what a module's forward does into a graph, at the graph's insertion point.

    Arguments:
        graph: the graph.
        path: of the module.
    """

    def __init__(self, graph: fx.Graph, path: str) -> None:
        self._tracer = fx.proxy.GraphAppendingTracer(graph)
        self._path = path

    def value(self, node: Any) -> Any:
        """Return the value of a node, to compute with; anything else as it is."""
        return fx.Proxy(node, self._tracer) if isinstance(node, fx.Node) else node

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a submodule."""
        return self._tracer.create_proxy("call_module", f"{self._path}.{name}", args, kwargs)

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function."""
        return self._tracer.create_proxy("call_function", function, args, {})

    def read(self, name: str) -> Any:
        """Read an attribute of the module when the graph runs: ``training`` of a submodule."""
        return self._tracer.create_proxy("get_attr", f"{self._path}.{name}", (), {})


@dataclass(frozen=True)
class Expanded:
    """A call of a module, as calls of its parts.

    Arguments:
        entry: the function that takes the call's arguments; a graph has it once for each call.
        settings: arguments of `entry` after the forward's own.
        body: writes the rest. It is given the result of `entry` and the call's arguments, and returns the result.
    """

    entry: Callable[..., Any]
    settings: tuple[Any, ...]
    body: Callable[[Parts, Any, tuple[Any, ...]], Any]


Expander = Callable[[Any], "Expanded | None"]
_expanders: dict[type[nn.Module], Expander] = {}


def expands(kind: type[nn.Module]) -> Callable[[Expander], Expander]:
    """Register an expander for exactly this class; it returns None for a module that was built another way."""

    def bind(expander: Expander) -> Expander:
        _expanders[kind] = expander
        return expander

    return bind


def expansion_of(module: nn.Module) -> Expanded | None:
    """Return what a call of `module` does, if it can be said; hooks on the module itself keep the call one."""
    register_leaves()

    kind = plain_class(module)
    expander = _expanders.get(kind)
    if expander is None or has_hooks(module) or sites_of(module):
        return None
    if any(callable(getattr(kind, name, None)) for name in vars(module)):  # a method replaced on the object
        return None
    return expander(module)


def has_parts(module: nn.Module, names: Iterable[str]) -> bool:
    """Say whether the module has a submodule by each of these names."""
    return all(module._modules.get(name) is not None for name in names)


def part_with(module: nn.Module, tensor: str) -> str:
    """Return the path of the part whose call reads `tensor`, once all calls in `module` that can be are expanded."""
    path, current = "", module
    names = tensor.split(".")[:-1]
    while names and expansion_of(current) is not None:
        while names:
            name = names.pop(0)
            current = current._modules[name]  # type: ignore[assignment]
            path = f"{path}.{name}" if path else name
            if not isinstance(current, (nn.ModuleList, nn.ModuleDict)):
                break
    return path
