"""The rewritten model of a traceable root: its own module tree under a lowered graph."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Collection
from typing import Any
from weakref import WeakValueDictionary

from torch import fx, nn

from rewriter._torch import LazyGraphModule
from rewriter.bindings._bake_first import refuse_package
from rewriter.bindings._late_changes import refuse_late_change, refuse_renamed, shared_names
from rewriter.bindings._layers import Layers
from rewriter.bindings._quick import quick
from rewriter.bindings._retrace import traceable
from rewriter.bindings._shell import Shell
from rewriter.bindings._state_methods import bind_state_hooks, take_state_methods
from rewriter.bindings._taken_over import TAKEN, TakenOver, Written, check_settings
from rewriter.context._validated import Validated
from rewriter.errors import ModelFileError, RewriterError
from rewriter.serialization._graph_data import graph_from_data, graph_to_data
from rewriter.serialization._names import loadable
from rewriter.serialization._vet import when_vetted
from rewriter.sites._assign import assign_attribute
from rewriter.sites._container import computed_slots, plain_class, refuse_mixed, refuse_override, sites_of
from rewriter.sites._loading import converting, converting_owner
from rewriter.sites._places import BATCHES, CAPTURED, CONTAINER, CONTEXTS, GRAPH_OF
from rewriter.sites._site import Site

_MARKS = "_reparam_marks"
_VALIDATED = "_reparam_validated"
_SLOTS = "_reparam_slots"
_NAMES = "_reparam_names"
_NOT_COPIED = frozenset(
    {"_graph", "_code", "_lineno_map", "_prologue_start", "_tracer_cls", CAPTURED, _MARKS, _VALIDATED, _SLOTS, TAKEN}
)
_OWN = ("_reparam_name", "_reparam_added", "_reparam_without", "_reparam_edited", _NAMES)


WRITTEN_AT_ONCE = 1000
"""The most nodes of a graph whose code is written before somebody asks for it."""

_classes: WeakValueDictionary[Any, Any] = WeakValueDictionary()
"""The class of each graph's code: equal models share one, as `torch.func.stack_module_state` requires."""


class _GraphClass(type):
    """A class that equal models share, so that its forward cannot be set for one of them."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name == "forward" and "_reparam_shared" in vars(cls):
            raise RewriterError(
                f"{cls.__name__} is the class of every rewritten model with this graph: set forward on the model itself"
            )
        super().__setattr__(name, value)


class RewrittenModule(LazyGraphModule, metaclass=_GraphClass):
    """A lowered graph over the module tree of the model that was rewritten.

    The submodules, tensors, hooks and plain attributes are the model's own, under their own names, so that the state
    dict reads as torch's parametrizations would have it. The captured graph stays beside the lowered one: bake and
    further rules lower it again. Both travel as data when the model is pickled: reading them back runs no code.

    Arguments:
        root: the model whose tree is taken over.
        captured: the graph as it was captured.
        graph: the graph to run.
        without: names of the optional passes that were left out; None if the graph runs as captured and reads its
            tensors as attributes, inside a model that keeps its class.
    """

    def __new__(cls, root: nn.Module, *_: Any) -> RewrittenModule:
        return _blank(_origin_of(root))

    def __init__(
        self, root: nn.Module, captured: fx.Graph, graph: fx.Graph, without: Collection[str] | None = ()
    ) -> None:
        self.__dict__.update({GRAPH_OF: _origin_of(root), "_reparam_name": plain_class(root).__name__})
        super().__init__(nn.Module(), fx.Graph())
        added = set(self.__dict__) - set(root.__dict__)
        self.__dict__.update({name: value for name, value in root.__dict__.items() if name not in _NOT_COPIED})
        self.__dict__[CAPTURED] = captured
        self.__dict__["_reparam_added"] = sorted(added)
        self.__dict__["_reparam_without"] = None if without is None else tuple(without)
        bind_state_hooks(self, root)
        self.take_lowered(graph)

    def recompile(self) -> Any:  # type: ignore[override]
        if len(self.graph.nodes) <= WRITTEN_AT_ONCE:
            return self._write()
        # Writing the code of thousands of nodes takes a fifth of the time of rewriting: the first use writes it.
        kind = self._new_class()
        for name in ("forward", "__call__"):
            setattr(kind, name, _written(name))
        self.__class__ = kind
        return None

    def real_recompile(self) -> None:
        """Write the code if it is not written; torch.fx calls this."""
        if isinstance(vars(type(self)).get("forward"), property):
            self._write()

    def _new_class(self) -> Any:
        kind: Any = type(_blank(self.__dict__[GRAPH_OF]))
        kind.__name__ = kind.__qualname__ = self.__dict__["_reparam_name"]
        take_state_methods(kind, self.__dict__[GRAPH_OF])
        return kind

    def _write(self) -> Any:
        kind = self._new_class()
        # torch.fx writes `forward` into the class. The model keeps its own until the new one is complete, since
        # another thread may call it.
        writer = object.__new__(kind)
        writer.__dict__ = self.__dict__
        code = fx.GraphModule.recompile(writer)
        kind.forward = traceable(kind.forward, quick(kind.forward, code.src))
        kind._reparam_shared = True
        functions = tuple(sorted(code.globals.items(), key=lambda pair: pair[0]))
        with contextlib.suppress(TypeError):  # a constant in the code may have no hash: then the class is not shared
            key = (kind.__name__, self.__dict__[GRAPH_OF], tuple(self._modules), code.src, functions)
            kind = _classes.setdefault(key, kind)
        self.__class__ = kind
        return code

    @property
    def captured(self) -> fx.Graph:
        """The graph as it was captured, without sites."""
        return self.__dict__[CAPTURED]  # type: ignore[no-any-return]

    @property
    def without(self) -> tuple[str, ...] | None:
        """Names of the optional passes that were left out; None if the graph runs as captured."""
        return self.__dict__["_reparam_without"]  # type: ignore[no-any-return]

    def take_lowered(self, graph: fx.Graph, names: list[list[str]] | None = None) -> None:
        """Run `graph`, which lowering wrote, and be known to the contexts of the sites.

        Arguments:
            names: of the modules that had several when the model was rewritten; None where that is now.
        """
        self.graph = graph
        self.__dict__[_MARKS] = Written(graph)
        self.__dict__.pop(_VALIDATED, None)
        self.__dict__.pop(_SLOTS, None)
        check_settings(self)
        names = shared_names(self) if names is None else names
        self.__dict__.update({_NAMES: names, TAKEN: TakenOver(self)})
        site = next((module for module in self.modules() if isinstance(module, Site)), None)
        if site is not None:
            site.contexts.graphs.add(self)

    @property
    def validated(self) -> Validated:
        """The cached values of the model's sites."""
        found: Validated | None = self.__dict__.get(_VALIDATED)
        if found is None:
            found = self.__dict__[_VALIDATED] = Validated(self.sites)
        return found

    def refuse_overridden(self) -> None:
        """Refuse a call after somebody put another tensor in the place of a computed one, or a module under one name.

        Raises:
            RewriterError: `torch.func.functional_call` did, or a module of several names was replaced.
        """
        slots: list[tuple[dict[str, Any], str]] | None = self.__dict__.get(_SLOTS)
        if slots is None:
            slots = self.__dict__[_SLOTS] = [*computed_slots(self)]
        for tensors, name in slots:
            if tensors[name] is not None:
                refuse_override(name)
        refuse_renamed(self, self.__dict__[_NAMES])
        check_settings(self)

    @property
    def edited(self) -> bool:
        """Whether somebody changed the graph after lowering wrote it; a copy knows of its original's edits."""
        written: Written | None = self.__dict__[_MARKS]
        if written is None:
            return True
        now = Written(self.graph).parts
        return len(written.parts) != len(now) or not all(map(operator.is_, written.parts, now))

    @property
    def sites(self) -> list[Site]:
        """The model's sites, in the order of the module tree."""
        return [module for module in self.modules() if isinstance(module, Site)]

    @property
    def was_graph(self) -> bool:
        """Whether the model that was rewritten was a GraphModule itself."""
        return self.__dict__[GRAPH_OF] is fx.GraphModule

    def restored(self) -> nn.Module:
        """Return the model in the class that it had, over the same modules and tensors, without this graph's sites."""
        check_settings(self)
        origin = self.__dict__[GRAPH_OF]
        if self.was_graph:
            module: nn.Module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=self._reparam_name)
        else:
            module = origin.__new__(origin)
        added = {*self._reparam_added, *_NOT_COPIED, *_OWN, CONTEXTS, GRAPH_OF, "forward"}
        module.__dict__.update({name: value for name, value in self.__dict__.items() if name not in added})
        for name in [name for name in module._buffers if name.startswith("reparam_constant_")]:
            del module._buffers[name]
            module._non_persistent_buffers_set.discard(name)
        module._modules.pop(BATCHES, None)
        if isinstance(module, fx.GraphModule):
            module.graph = copy.deepcopy(self.captured)
        return module

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", ())
        if name in modules:
            return modules[name]
        if CONTAINER in modules and name in sites_of(self):
            return sites_of(self)[name].current_member(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            origin = self.__dict__.get(GRAPH_OF, nn.Module)
            if hasattr(origin, name):
                raise AttributeError(
                    f"{origin.__name__}.{name} is not part of the graph that the model was rewritten to; "
                    "bake() gives the class back, and rewrite(…, capture='module') keeps it"
                ) from None
            raise

    load_state_dict = converting(fx.GraphModule.load_state_dict)
    _load_from_state_dict = converting_owner(fx.GraphModule._load_from_state_dict)

    __reduce_package__ = refuse_package  # type: ignore[assignment]

    def __prepare_scriptable__(self) -> fx.GraphModule:
        from rewriter.passes import scriptable

        return scriptable(self)

    def __str__(self) -> str:
        from rewriter.passes import print_graph

        return f"{nn.Module.__repr__(self)}\n\n{print_graph(self)}"

    def __setattr__(self, name: str, value: Any) -> None:
        if CONTAINER in self.__dict__.get("_modules", ()) and name in sites_of(self):
            assign_attribute(sites_of(self)[name], name, value)
            return
        refuse_late_change(self, name, value)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        clone = _blank(self.__dict__[GRAPH_OF])
        memo[id(self)] = clone
        _revive(clone, copy.deepcopy(self._carried(), memo), copy.deepcopy(self.captured), copy.deepcopy(self.graph))
        return clone

    def __copy__(self) -> RewrittenModule:
        clone = _blank(self.__dict__[GRAPH_OF])
        _revive(clone, self._carried(), self.captured, copy.deepcopy(self.graph))
        return clone

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        # What replaces a replica's children and tensors must not write into the dicts of the original.
        for name in ("_modules", "_buffers"):
            replica.__dict__[name] = dict(self.__dict__[name])
        replica.__dict__["_parameters"] = {}
        return replica

    def __reduce__(self) -> Any:
        return (
            only_load_model_reads_this_graph,
            (graph_to_data(self.captured), graph_to_data(self.graph)),
            self._carried(),
        )

    def _carried(self) -> dict[str, Any]:
        refuse_mixed([self])
        check_settings(self)
        carried = {name: value for name, value in self.__dict__.items() if name not in _NOT_COPIED}
        carried["_reparam_edited"] = self.edited
        return carried


class RewrittenSequential(Layers, RewrittenModule):
    """The graph of an `nn.Sequential`, whose layers are found by their place as they were."""


@loadable(builds=[Shell], home="rewriter.io")
def only_load_model_reads_this_graph(captured: dict[str, Any], graph: dict[str, Any]) -> Shell:
    """Make a shell that becomes a rewritten model when its state is read: the first half of unpickling one."""

    def become(shell: nn.Module, state: dict[str, Any]) -> None:
        clone: Any = shell
        if not str(state["_reparam_name"]).isidentifier():
            raise ModelFileError("the file is damaged: the class of a model has no name")
        clone.__class__ = type(_blank(state[GRAPH_OF]))
        clone.__dict__.update(state)

        def finish() -> None:
            _revive(clone, clone.__dict__, graph_from_data(captured, clone), graph_from_data(graph, clone))

        when_vetted(clone, finish)

    return Shell(become)


def _written(name: str) -> property:
    """Return the property of a class without code that writes the code and gives the attribute of the new class."""

    def read(self: RewrittenModule) -> Any:
        self._write()
        return getattr(self, name)

    return property(read)


def _origin_of(root: nn.Module) -> Any:
    """Return the class to give back: of a model that is a graph, GraphModule."""
    if isinstance(root, RewrittenModule):
        return root.__dict__[GRAPH_OF]
    kind = plain_class(root)
    return fx.GraphModule if issubclass(kind, fx.GraphModule) else kind


def _blank(origin: type[nn.Module]) -> RewrittenModule:
    """Return an object without state, of a class of its own, which torch.fx makes for each graph."""
    base = RewrittenSequential if issubclass(origin, nn.Sequential) else RewrittenModule
    made: RewrittenModule = fx.GraphModule.__new__(base)
    return made


def _revive(clone: RewrittenModule, state: dict[str, Any], captured: fx.Graph, graph: fx.Graph) -> None:
    clone.__dict__.update(state)
    clone.__dict__["_tracer_cls"] = None
    clone.__dict__[CAPTURED] = captured
    type(clone).__name__ = state["_reparam_name"]
    clone.take_lowered(graph, state.get(_NAMES))
    if state["_reparam_edited"]:
        clone.__dict__[_MARKS] = None
