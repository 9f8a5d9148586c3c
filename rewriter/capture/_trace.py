"""Symbolic tracing that refuses rather than records something else than what the model does.

torch.fx runs a forward once and writes down what it saw. What it cannot see it bakes in: the training flag, random
tensors, the type of a value, a grad mode, attributes that a forward sets. Here each of these is either made visible or
makes the module a node of its own, which runs as it is.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from rewriter.capture._bytecode import asks_of_result
from rewriter.capture._effects import Snapshot, still_alive
from rewriter.capture._guards import Flag, guarded, refuse_unknown_call
from rewriter.capture._leaves import has_own_forward
from rewriter.capture._proxy import Value, forget_kinds, remember_kind
from rewriter.capture._reason import reason
from rewriter.capture._signature import absences, check_root, optional_arguments, outline, resolve_annotations
from rewriter.context._tracers import own
from rewriter.errors import CaptureError


@dataclass
class Trace:
    """A captured graph and the modules that stayed nodes of their own although torch.fx was asked to look inside.

    Arguments:
        graph: the graph.
        opaque: module path → why it could not be traced.
    """

    graph: fx.Graph
    opaque: dict[str, str] = field(default_factory=dict)


def trace(root: nn.Module, inside: set[str]) -> Trace:
    """Capture the forward of `root`.

    Arguments:
        root: the model; unchanged afterwards.
        inside: paths of the modules to look inside; all others become one node each.

    Raises:
        CaptureError: the root's own forward cannot be captured, and why.
    """
    check_root(root)
    traced = _trace_once(root, inside, {})
    for absent in absences(optional_arguments(root)):
        other = _trace_once(root, inside, absent)
        if outline(traced.graph, absent) != outline(other.graph, absent):
            raise CaptureError(
                f"what {type(root).__name__}.forward does depends on whether {' and '.join(absent)} is None"
            )
    return traced


def _trace_once(root: nn.Module, inside: set[str], concrete: dict[str, Any]) -> Trace:
    tracer = _Tracer(root, inside)
    before = Snapshot(root.modules())
    own.add(tracer)
    try:
        with guarded(tracer, root):
            graph = tracer.trace(root, concrete_args=concrete or None)
        tracer.check_refusals()
    except Exception as problem:
        before.restore()
        raise CaptureError(f"torch.fx cannot trace {type(root).__name__}.forward: {reason(problem)}") from problem
    finally:
        own.discard(tracer)
    changed = before.restore()
    if changed:
        raise CaptureError(f"the forward changes {', '.join(changed)} as it runs")
    values = tracer.values
    tracer.proxies.clear()
    if still_alive(values):
        raise CaptureError("the forward keeps an intermediate value where a later call may find it")
    _check_keywords(graph)
    forget_kinds(graph)
    resolve_annotations(root, graph)
    return Trace(graph, tracer.opaque)


def _check_keywords(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("**") and node.users:
            raise CaptureError(f"the forward looks into its {node.target}, which differ from call to call")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, inside: set[str]) -> None:
        super().__init__()
        self.inside = inside
        self.opaque: dict[str, str] = {}
        self.paths: dict[nn.Module, str] = {}
        self.tensors: dict[Tensor, str] = {}
        for path, module in root.named_modules():
            self.paths.setdefault(module, path)
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    self.tensors.setdefault(tensor, f"{path}.{name}" if path else name)
        self.proxies: dict[str, fx.Proxy] = {}
        self.values: list[weakref.ref[fx.Proxy]] = []
        self.refusals: list[str] = []
        self.modes = _modes()
        self.thread = threading.get_ident()

    def refuse(self, message: str) -> None:
        """Raise, and remember it in case the forward catches exceptions."""
        self.refusals.append(message)
        raise CaptureError(message)

    def check_refusals(self) -> None:
        """Raise what a forward caught and went on from."""
        if self.refusals:
            raise CaptureError(self.refusals[0])

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() > self.modes:
            self.refuse(
                "its forward enters a mode (a default device, a TorchFunctionMode), which a graph does not show"
            )
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        remember_kind(node)
        value = Value(node, self)
        self.values.append(weakref.ref(value))
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse(f"control flow depends on a value, {obj.node.name}, that is known only when the model runs")
        raise AssertionError

    def iter(self, obj: fx.Proxy) -> Any:
        self.refuse(f"a loop goes over a value, {obj.node.name}, whose length is known only when the model runs")
        raise AssertionError

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse(f"a value, {obj.node.name}, is unpacked with **, and its keys are known only when the model runs")
        raise AssertionError

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return self.paths[mod]
        except KeyError:
            raise NameError(f"a {type(mod).__name__} is called that is no submodule of the model") from None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.inside or module_qualified_name in self.opaque

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:  # torch.fx records calls wherever they happen
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self._called(m, forward, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)))
        known, refusals = dict(self.proxies), list(self.refusals)
        stack, calls = self.module_stack.copy(), dict(self.num_calls)
        before = Snapshot([m])
        try:
            result = super().call_module(m, forward, args, kwargs)
            changed = before.restore()
            if changed:
                raise CaptureError(f"its forward changes {', '.join(changed)} as it runs")
            if len(self.refusals) > len(refusals):
                raise CaptureError(self.refusals[-1])
            return result
        except Exception as problem:
            before.restore()
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.proxies, self.refusals = known, refusals
            self.module_stack, self.num_calls = stack, calls
            self.opaque[path] = reason(problem)
        return self._called(m, forward, args, kwargs)

    def _called(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_unknown_call(m)
        if has_own_forward(m) and self.paths[m] in self.inside:  # nothing takes the values it would be handed
            path = self.paths[m]
            self.refuse(f"the forward of {path} was replaced on the object itself: {self.opaque[path]}")
        variable = None if type(m).__module__.startswith("torch.nn.") else asks_of_result()
        if variable is not None:
            self.refuse(f"whether {variable}, which {self.paths[m]} returns, is None is known only when the model runs")
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(m, nn.MultiheadAttention) and (*args[4:5], kwargs.get("need_weights"))[0] is False:
            return result[0], None
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        if isinstance(attr_val, Tensor) and attr_val in self.tensors:
            return self.read(self.tensors[attr_val])
        return self.read(attr_val.target) if isinstance(attr_val, Flag) else attr_val

    def read(self, target: str) -> fx.Proxy:
        """Return the value that reads `target`; one for each trace."""
        if target not in self.proxies:
            self.proxies[target] = self.create_proxy("get_attr", target, (), {})
        return self.proxies[target]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, (Value, Attribute)):
            return a.node
        if isinstance(a, Tensor):
            if a not in self.tensors:
                raise CaptureError("its forward uses a tensor that is neither a parameter nor a buffer")
            return self.read(self.tensors[a]).node
        if isinstance(a, nn.Module):
            raise CaptureError(f"its forward passes a module ({type(a).__name__}) as an argument")
        if isinstance(a, (dict, list)) and type(a).__module__ != "builtins" and "torch.fx" not in type(a).__module__:
            raise CaptureError(f"its forward makes a {type(a).__name__}, of which a graph keeps the items only")
        return super().create_arg(a)


def _modes() -> int:
    return torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
