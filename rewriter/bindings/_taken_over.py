"""What a graph has taken over of its modules' settings, where nothing notices that they change.

Setting an attribute is refused (`refuse_late_change`). Containers and plain objects change in place, a list of modules
grows, a class gets another attribute or method. A graph compares these when it runs, and warns by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn

from rewriter.bindings._late_changes import WAY_OUT, inlined_modules
from rewriter.capture import names_read
from rewriter.context._fingerprint import COMPARED, settings_of
from rewriter.sites._container import plain_class
from rewriter.sites._places import GRAPH_OF

TAKEN = "_reparam_taken"
"""The attribute in which the model of a graph has what the graph has taken over."""
_LISTS = (nn.ModuleList, nn.ModuleDict)
_CONTAINERS = (list, tuple, set, dict)
_OPAQUE = (nn.Module, Tensor, type, FunctionType)
_DEPTH = 2
_MOST = 100
"""Of larger containers and objects the size alone is compared."""


class TakenOver:
    """The settings that a graph has taken over from the modules that are inlined in it.

    Arguments:
        model: the model of the graph.
    """

    def __init__(self, model: Any) -> None:
        self._taken: dict[Any, tuple[str, Mapping[str, Any], str, Any]] = {}
        for module, path in inlined_modules(model).items():
            for key, name, holder, attribute in _changeable(module):
                shown = ".".join(filter(None, (path, name))) if isinstance(holder, dict) else name
                self._taken.setdefault(key, (shown, holder, attribute, _content(attribute, holder[attribute])))

    def check(self) -> None:
        """Warn of each setting that has changed, once."""
        for identity, (shown, holder, attribute, before) in self._taken.items():
            now = _content(attribute, holder.get(attribute))
            if not _same(now, before):
                self._taken[identity] = (shown, holder, attribute, now)
                warnings.warn(
                    f"{shown} has changed, and the graph of the rewritten model goes on with what it was: the forward "
                    f"that reads it is inlined. To change it, {WAY_OUT}",
                    stacklevel=5,
                )


def check_settings(model: nn.Module) -> None:
    """Warn of the settings that have changed since the graph of `model` was lowered."""
    taken: TakenOver | None = model.__dict__.get(TAKEN)
    if taken is not None:
        taken.check()


_Place = tuple[Any, str, Mapping[str, Any], str]


def _changeable(module: nn.Module) -> Iterator[_Place]:
    """Yield what the forward of a module reads and what may change unnoticed.

    Each has a key that it shares with the same thing elsewhere, a name, and the place where it is found.
    """
    kind: Any = module.__dict__.get(GRAPH_OF) or plain_class(module)
    if isinstance(module, _LISTS):
        yield module, "", module.__dict__, "_modules"
    if _is_torchs(kind):
        return
    names = names_read(kind)
    for name, value in settings_of(module).items():
        if name in names and (isinstance(value, _CONTAINERS) or _has_attributes(value)):
            yield id(value), name, module.__dict__, name
    for base in kind.__mro__:
        for name, value in () if _is_torchs(base) else vars(base).items():
            if name == "forward" or (name in names and (isinstance(value, FunctionType) or type(value) in COMPARED)):
                yield (base, name), f"{base.__name__}.{name}", vars(base), name


def _is_torchs(kind: Any) -> bool:
    return str(kind.__module__).partition(".")[0] in ("torch", "builtins", "rewriter")


def _has_attributes(value: Any) -> bool:
    return not isinstance(value, _OPAQUE) and hasattr(value, "__dict__")


def _content(name: str, value: Any, depth: int = _DEPTH) -> Any:
    """Return what is compared of a setting: the items of a container, or the attributes of an object."""
    if name == "_modules":
        return [*value]  # modules that are replaced are found when the graph calls them
    if not depth or isinstance(value, _OPAQUE):
        return value
    if depth == _DEPTH and _has_attributes(value) and not isinstance(value, _CONTAINERS):
        value = vars(value)
    if not isinstance(value, _CONTAINERS):
        return value
    if len(value) > _MOST:
        return len(value)
    if isinstance(value, dict):
        return [(key, _content("", item, depth - 1)) for key, item in value.items()]
    return value.copy() if isinstance(value, set) else [_content("", item, depth - 1) for item in value]


def _same(one: Any, other: Any) -> bool:
    if type(one) in (list, tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and type(one) in COMPARED and bool(one == other))


class Written:
    """The nodes of a graph as lowering wrote them: torch.fx replaces arguments whole, so identity shows an edit.

    It is an object because torch.export puts copies of lists into a model for the time of its trace.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.parts = [part for node in graph.nodes for part in (node, node.op, node.target, node.args, node.kwargs)]
