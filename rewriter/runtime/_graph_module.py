"""The rewritten model of a traceable root: its own module tree under a graph."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, overload
from weakref import WeakValueDictionary

from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule

from rewriter.runtime._mixed import refuse_mixed
from rewriter.runtime._owner_class import child_property, plain_class
from rewriter.runtime._places import BATCHES, CONTAINER, GRAPH_OF, SESSION, STANDING
from rewriter.runtime._plain_state import explained
from rewriter.runtime._retrace import traceable
from rewriter.runtime._shell import Shell
from rewriter.runtime._sites import sites_of
from rewriter.runtime._standing import given_what_holds
from rewriter.runtime._tensor import ParametrizedTensor
from rewriter.serialization._graph_data import graph_from_data, graph_to_data
from rewriter.serialization._names import loadable

_classes: WeakValueDictionary[Any, type[fx.GraphModule]] = WeakValueDictionary()
"""Generated class of each graph: models with equal graphs share theirs, as models of a hand-written class do."""

WRITTEN_AT_ONCE = 1000
"""The most nodes of a graph whose code is written without being asked for."""

_NOT_COPIED = frozenset({"_graph", "_code", "_lineno_map", "_prologue_start", "_tracer_cls", STANDING})


class RewrittenModule(fx.GraphModule):
    """A graph over the module tree of the model that was rewritten.

    The submodules, tensors, hooks and plain attributes are the model's own, under their own names, so that the state
    dict reads as torch's parametrizations would have it. The graph travels as data when the model is pickled: reading
    it back runs no code and traces nothing. Its code is written when it is first asked for.

    Arguments:
        root: the model whose tree is taken over.
        graph: the graph to run.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        origin = plain_class(root)
        super().__init__(nn.Module(), fx.Graph(), class_name=origin.__name__)
        added = set(self.__dict__) - set(root.__dict__)
        self.__dict__.update({name: value for name, value in root.__dict__.items() if name not in _NOT_COPIED})
        self.__dict__[GRAPH_OF] = fx.GraphModule if issubclass(origin, fx.GraphModule) else origin
        self.__dict__["_reparam_name"] = origin.__name__
        self.__dict__["_reparam_added"] = sorted(added)
        for name in ("_code", "_lineno_map", "_prologue_start"):  # of the empty graph
            del self.__dict__[name]
        self.__dict__["_graph"] = graph
        graph.owning_module = self
        self.__class__ = _own_class(origin.__name__, _UnwrittenSequential if self._is_sequential() else _Unwritten)
        if len(graph.nodes) <= WRITTEN_AT_ONCE:  # equal models are of one class from the start
            self.recompile()
        _join(self)

    def recompile(self) -> Any:
        from rewriter.passes import keeps_values

        name = type(self).__name__
        # torch.fx writes `forward` into the class, which other models may have too. The model keeps its class until
        # the new one is complete, since another thread may call it.
        kind = _own_class(name, RewrittenSequential if self._is_sequential() else RewrittenModule)
        writer = object.__new__(kind)
        writer.__dict__ = self.__dict__
        code = fx.GraphModule.recompile(writer)
        kind.forward = traceable(kind.forward)
        keeps = keeps_values(writer)
        if keeps:
            kind.forward = given_what_holds(kind.forward)
        self.__dict__.pop(STANDING, None)
        for child in self._children_named():
            setattr(kind, child, child_property(child))
        functions = tuple(sorted(code.globals.items(), key=lambda pair: pair[0]))
        with contextlib.suppress(TypeError):  # what cannot be compared has a class of its own
            kind = _classes.setdefault((name, code.src, functions, keeps), kind)
        self.__class__ = kind
        return code

    def _children_named(self) -> set[str]:
        """Return the submodules that the code of the graph starts from, but for names that this class has itself."""
        nodes = [node for node in self.graph.nodes if node.op in ("call_module", "get_attr")]
        reached = {str(node.target).partition(".")[0] for node in nodes}
        return {name for name in reached if name in self._modules and not hasattr(RewrittenModule, name)}

    def _is_sequential(self) -> bool:
        return issubclass(self.__dict__.get(GRAPH_OF, nn.Module), nn.Sequential)

    @property
    def was_graph(self) -> bool:
        """Whether the model that was rewritten was a GraphModule itself."""
        return self.__dict__[GRAPH_OF] is fx.GraphModule

    def restored(self) -> nn.Module:
        """Return the model in the class that it had, over the same modules and tensors, without this graph's sites."""
        origin = self.__dict__[GRAPH_OF]
        if self.was_graph:
            module: nn.Module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=self._reparam_name)
        else:
            module = origin.__new__(origin)
        added = {*self._reparam_added, *_NOT_COPIED, SESSION, GRAPH_OF, "_reparam_name", "_reparam_added"}
        module.__dict__.update({name: value for name, value in self.__dict__.items() if name not in added})
        for name in [name for name in module._buffers if name.startswith("reparam_constant_")]:
            del module._buffers[name]
            module._non_persistent_buffers_set.discard(name)
        if isinstance(module, fx.GraphModule):
            module.graph = self.graph
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

    load_state_dict = explained(fx.GraphModule.load_state_dict)

    def __prepare_scriptable__(self) -> fx.GraphModule:
        from rewriter.passes import scriptable

        return scriptable(self)

    def __str__(self) -> str:
        from rewriter.passes import print_graph

        return f"{nn.Module.__repr__(self)}\n\n{print_graph(self)}"

    def written(self) -> RewrittenModule:
        """Return this model with the code of its graph written."""
        if isinstance(self, _Unwritten):
            self.recompile()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        clone: RewrittenModule = RewrittenModule.__new__(RewrittenModule)
        memo[id(self)] = clone
        _revive(clone, copy.deepcopy(self.written()._carried(), memo), copy.deepcopy(self.graph, memo))
        return clone

    def __copy__(self) -> RewrittenModule:
        clone: RewrittenModule = RewrittenModule.__new__(RewrittenModule)
        _revive(clone, self.written()._carried(), copy.deepcopy(self.graph))
        return clone

    def _replicate_for_data_parallel(self) -> Any:
        self.written()
        replica: Any = super()._replicate_for_data_parallel()
        # What replaces a replica's children and tensors must not write into the dicts of the original.
        for name in ("_modules", "_buffers"):
            replica.__dict__[name] = dict(self.__dict__[name])
        replica.__dict__["_parameters"] = {}
        return replica

    def __reduce__(self) -> Any:
        return (rebuild_rewritten, (graph_to_data(self.graph),), self._carried())

    def _carried(self) -> dict[str, Any]:
        refuse_mixed([self])
        return {name: value for name, value in self.__dict__.items() if name not in _NOT_COPIED}


class RewrittenSequential(RewrittenModule):
    """The graph of an `nn.Sequential`, whose layers are found by their place as they were."""

    def __len__(self) -> int:
        return len(self._layers())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._layers().values())

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> nn.Sequential: ...

    def __getitem__(self, index: int | slice) -> nn.Module:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict([*self._layers().items()][index]))
        return self._layers()[self._key(index)]

    def __setitem__(self, index: int, layer: nn.Module) -> None:
        setattr(self, self._key(index), layer)

    def _key(self, index: int) -> str:
        keys = [*self._layers()]
        if not -len(keys) <= index < len(keys):
            raise IndexError(f"layer {index} of {len(keys)}")
        return keys[index]

    def _layers(self) -> dict[str, nn.Module]:
        """Return the layers by name, without what evaluates several tensors at once."""
        return {name: layer for name, layer in self._modules.items() if layer is not None and name != BATCHES}


class _Unwritten(RewrittenModule, _LazyGraphModule):
    """A rewritten model whose code nobody has asked for: whoever does makes it a RewrittenModule like any other.

    Writing the code of a model of thousands of sites would be a quarter of the time of rewriting it. The base class
    says so to torch.fx, which asks for the code of a class in its own way.
    """

    @property
    def forward(self) -> Any:  # type: ignore[override]
        return self.written().forward

    @property
    def __call__(self) -> Any:  # type: ignore[override]
        return self.written().__call__

    @property
    def code(self) -> str:
        return self.written().code

    def real_recompile(self) -> None:
        self.written()


class _UnwrittenSequential(RewrittenSequential, _Unwritten):
    """The same of an `nn.Sequential`."""


@loadable(builds=[Shell])
def rebuild_rewritten(graph: dict[str, Any]) -> Shell:
    """Make a shell that becomes a rewritten model once its state is read: the first half of unpickling one."""

    def become(shell: nn.Module, state: dict[str, Any]) -> None:
        clone: Any = shell
        clone.__class__ = type(RewrittenModule.__new__(RewrittenModule))
        clone.__dict__.update(state)
        _revive(clone, state, graph_from_data(graph, clone))

    return Shell(become)


def _own_class(name: str, base: type[RewrittenModule] = RewrittenModule) -> Any:
    """Return a new class of one model."""
    kind: Any = type(base.__new__(base))
    kind.__name__ = name
    return kind


def _revive(clone: RewrittenModule, state: dict[str, Any], graph: fx.Graph) -> None:
    clone.__dict__.update(state)
    clone.__dict__["_tracer_cls"] = None
    type(clone).__name__ = state["_reparam_name"]  # a class of its own still
    clone.graph = graph
    _join(clone)


def _join(model: RewrittenModule) -> None:
    """Make the model known to the session of its sites."""
    for module in model.modules():
        if isinstance(module, ParametrizedTensor):
            module.session.graphs.add(model)
            break
