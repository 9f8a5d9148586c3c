"""Changes of a module after its forward became part of a graph: refused where they would change nothing.

The graph has the functions that an inlined module would call, with the settings it had. It does not call the module. A
late change of such a setting, of a child or of the forward would have no effect, and the baked model would compute
something else than the rewritten one.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType
from typing import Any

from torch import fx, nn

from rewriter._given import is_fsdp_hook, is_fully_sharded
from rewriter.context._fingerprint import same_setting
from rewriter.errors import RewriterError
from rewriter.sites._container import Sites, plain_class
from rewriter.sites._places import BATCHES, CONTAINER, CONTEXTS, GRAPH_OF
from rewriter.sites._site import Site

_REGISTER = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
    "register_backward_hook",
)
_CHANGE_CHILDREN = ("add_module", "register_module", "insert", "__delitem__")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BOOKKEEPING = frozenset(nn.Module().__dict__)
WAY_OUT = "bake() the model, change it and rewrite it again; or rewrite it with capture='module', which keeps forwards"

_Paths = weakref.WeakKeyDictionary[nn.Module, str]
_known: weakref.WeakKeyDictionary[fx.GraphModule, tuple[weakref.ref[fx.Graph], _Paths]] = weakref.WeakKeyDictionary()


def guarded_methods(plain: Any) -> dict[str, Any]:
    """Return the methods of a class that change what a graph has inlined: hooks warn, children are refused."""
    methods = {name: _warning(getattr(plain, name)) for name in _REGISTER if hasattr(plain, name)}
    if issubclass(plain, _CONTAINERS):
        methods |= {name: _refusing(getattr(plain, name)) for name in _CHANGE_CHILDREN if hasattr(plain, name)}
    return methods


def _warning(register: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(register)
    def registering(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = inlined_as(self)
        if path and any(map(is_fsdp_hook, args)):
            raise RewriterError(_sharded_in_vain(path))
        if path:
            warnings.warn(
                f"this hook of module {path} will not run: the module is inlined in the graph of the rewritten model, "
                "which does not call it. Register hooks before the model is rewritten, or rewrite it with "
                "capture='module'",
                stacklevel=2,
            )
        return register(self, *args, **kwargs)

    return registering


def _sharded_in_vain(path: str) -> str:
    return (
        f"fully_shard cannot shard {path} by itself: the module is inlined in the graph of the rewritten model, which "
        "does not call it, so that nothing would gather its shards. Rewrite the model with capture='module' and shard "
        "its blocks, or call fully_shard once, with the whole model"
    )


def refuse_sharded_parts(model: fx.GraphModule) -> None:
    """Name a module that `fully_shard` sharded although the graph does not call it.

    Raises:
        RewriterError: there is one.
    """
    for module, path in _paths(model).items():
        if is_fully_sharded(module):
            raise RewriterError(_sharded_in_vain(path))


def _refusing(change: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(change)
    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = inlined_as(self)
        if path is not None:
            raise RewriterError(
                f"the children of {path or 'the model'} are inlined in the graph of the rewritten model; "
                f"{change.__name__} would have no effect. To change them, {WAY_OUT}"
            )
        return change(self, *args, **kwargs)

    return changing


def refuse_late_change(module: nn.Module, name: str, value: Any) -> None:
    """Refuse to set an attribute whose former value a graph has taken over.

    Raises:
        RewriterError: the module is inlined, and its forward may read the attribute.
    """
    state = module.__dict__
    kind: Any = plain_class(module) if GRAPH_OF not in state else state[GRAPH_OF]
    if name == "forward":
        if GRAPH_OF in state or (name not in state and value == getattr(module, name)):
            return  # the graph of the root stays what its forward runs
    elif name.startswith("_") or name in _BOOKKEEPING:
        return
    elif name in state:
        if same_setting(state[name], value) or not _may_read(kind, name):
            return
    elif not isinstance(value, nn.Module) and not hasattr(kind, name):
        return  # no forward was captured that read it
    elif name in module.__dict__.get("_modules", ()) or not _may_read(kind, name):
        _refuse_read_elsewhere(module, name, value)
        return  # a replaced child: the graph calls it, or misses its site by name
    path = inlined_as(module)
    if path is not None:
        shown = f"{path}.{name}" if path else name
        raise RewriterError(
            f"setting {shown} would have no effect: the forward that reads it is inlined in the graph of the rewritten "
            f"model. To change it, {WAY_OUT}"
        )


def _refuse_read_elsewhere(parent: nn.Module, name: str, value: Any) -> None:
    """Refuse to replace a child from whose tensors a chain elsewhere computes: it would go on with the old ones."""
    child = parent.__dict__.get("_modules", {}).get(name)
    if child is None or child is value:
        return
    inside = set(child.modules())
    for site in [part for part in parent.modules() if isinstance(part, Site) and part not in inside]:
        for read, owner in site.reads_from():
            if owner in inside:
                raise RewriterError(
                    f"{site.spec.name} is computed from {read}, and its chain would go on with that of the module "
                    f"which is called {name} now: bake() the model, change it and rewrite it again"
                )


def _may_read(kind: Any, name: str) -> bool:
    """Say whether a method of the class may read an attribute; torch's own classes read all of theirs."""
    return kind.__module__.startswith("torch.nn.") or name in _names_in(kind)


@functools.lru_cache(maxsize=256)
def _names_in(kind: Any) -> frozenset[str]:
    """Return the attribute names and strings in the methods of a class, its constructor aside."""
    codes = [
        code
        for base in kind.__mro__
        if base.__module__.partition(".")[0] not in ("torch", "builtins")
        for name, member in vars(base).items()
        if name != "__init__"
        for code in _codes(member)
    ]
    found: set[str] = set()
    while codes:
        code = codes.pop()
        found.update(code.co_names)
        found.update(const for const in code.co_consts if isinstance(const, str))
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    return frozenset(found)


def _codes(member: Any) -> Iterator[CodeType]:
    for function in (member, getattr(member, "__func__", None), getattr(member, "fget", None)):
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            yield code


def refuse_replaced(model: fx.GraphModule) -> None:
    """Name the module that was replaced, if a graph needs one that was: its sites are gone with it.

    Arguments:
        model: where the modules are.

    Raises:
        RewriterError: one was.
    """
    for node in model.graph.nodes:
        owner, found, tensor = str(node.target).partition(f".{CONTAINER}.")
        if node.op != "call_module" or not found:
            continue
        try:
            model.get_submodule(str(node.target))
        except AttributeError:
            raise _replaced(owner, tensor) from None


def shared_names(model: Any) -> list[list[str]]:
    """Return the names of each module that a graph calls, or has inlined, and that has several.

    The graph knows such a module by its first name, and the site of a tied tensor by its first owner: a further owner
    is a group of one.
    """
    inlined = inlined_modules(model)
    names: dict[nn.Module, list[str]] = {}
    tied: list[list[str]] = []
    pending: list[tuple[str, nn.Module, bool]] = [("", model, False)]
    while pending:
        path, module, seen = pending.pop()
        known = names.setdefault(module, [])
        known += [path] if seen or not known else []
        for name, child in reversed(module._modules.items()):
            if isinstance(child, Sites):
                tied += [[path]] if child.owned_elsewhere else []
            elif child is not None and name != BATCHES:
                pending.append((f"{path}.{name}" if path else name, child, module in inlined))
    return [known for known in names.values() if len(known) > 1] + tied


def refuse_renamed(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Refuse a model in which a module of several names was replaced under one of them.

    Arguments:
        model: where the modules are.
        groups: what `shared_names` found when the graph was lowered.

    Raises:
        RewriterError: one was.
    """
    for first, *others in groups:
        module = module_at(model, first)
        if not others and (module is None or CONTAINER not in module._modules):
            raise _replaced(first, "tied tensor")
        for other in others:
            if module_at(model, other) is not module:
                raise RewriterError(
                    f"{first} and {other} were one module when the model was rewritten, and the graph calls it by one "
                    "name for both: bake() the model, which takes in what is there now, and rewrite the result"
                )


def module_at(model: Any, path: str) -> Any:
    """Return the module at a path, found in dictionaries; None if there is none."""
    try:
        for name in path.split(".") if path else ():
            model = model._modules[name]
    except (KeyError, AttributeError):
        return None
    return model


def _replaced(owner: str, tensor: str) -> RewriterError:
    return RewriterError(
        f"{owner} was replaced or removed after the model was rewritten, and the graph still computes the {tensor} of "
        "the module that was there: bake() the model, which takes in what is there now, and rewrite the result"
    )


def inlined_modules(model: Any) -> dict[nn.Module, str]:
    """Return the modules that a graph has inlined, with their paths; the root among them."""
    return {model: "", **_paths(model)}


def inlined_as(module: nn.Module) -> str | None:
    """Return the path of a module in the model whose graph has its forward inlined, ``""`` for the root; else None."""
    if GRAPH_OF in module.__dict__:
        return ""
    contexts = module.__dict__.get(CONTEXTS)
    for model in contexts.graphs if contexts is not None else ():
        path = _paths(model).get(module)
        if path is not None:
            return path
    return None


def _paths(model: Any) -> _Paths:
    graph: fx.Graph = model.__dict__["_graph"]
    known = _known.get(model)
    if known is None or known[0]() is not graph:
        known = _known[model] = weakref.ref(graph), _find(model, graph)
    return known[1]


def _find(model: nn.Module, graph: fx.Graph) -> _Paths:
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    found: _Paths = weakref.WeakKeyDictionary()
    run: list[nn.Module] = []
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if path in called:
            run += module.modules()
            continue
        if path:
            found.setdefault(module, path)
        for name, child in module._modules.items():
            if child is not None and name != CONTAINER:
                pending.append((f"{path}.{name}" if path else name, child))
    for module in run:  # under another name
        found.pop(module, None)
    return found
