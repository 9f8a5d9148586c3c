"""Symbolic tracing that refuses a forward which its graph would not repeat.

torch.fx runs a forward once and writes down what happens to the inputs. What it does not see becomes a constant: the
training flag, random tensors, the type of a value, a grad mode. Here each of these is a node of the graph, or a reason
to keep the module as one node that runs as it is. docs/capture.md lists them.

Nothing outside the model is patched: the tracer, the values and a TorchFunctionMode are objects of their own. On the
model the training flags are replaced for the time of a trace.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from rewriter._torch import ambient_state, function_modes
from rewriter.capture._effects import Snapshot
from rewriter.capture._forward import (
    absences,
    check_call,
    check_root,
    outline,
    question,
    resolve_annotations,
    tests_result,
)
from rewriter.capture._leaves import has_own_forward
from rewriter.capture._reason import KEPT, reason
from rewriter.capture._value import Recorder, Value
from rewriter.context._tracers import own
from rewriter.errors import CaptureError


@dataclass
class Trace:
    """A captured graph and the modules that tracing was to inline and could not.

    Arguments:
        graph: the graph.
        opaque: module path → why it stays one node.
    """

    graph: fx.Graph
    opaque: dict[str, str] = field(default_factory=dict)


def trace(root: nn.Module, inside: set[str]) -> Trace:
    """Capture the forward of `root`.

    Arguments:
        root: the model; unchanged afterwards.
        inside: paths of the modules to inline; all others become one node each.

    Raises:
        CaptureError: the root's own forward cannot be captured, and why.
    """
    check_root(root)
    traced = _trace_once(root, inside, {})
    for absent in absences(root):
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
        if "" in tracer.opaque:
            raise CaptureError(tracer.opaque[""])
        with torch.enable_grad(), Recorder(tracer), _flags(tracer):  # autograd.Function turns gradients off: see _check
            tracer.ambient, tracer.modes = ambient_state(), function_modes()  # which the forward has to leave
            graph = tracer.trace(root, concrete_args=concrete or None)
        if tracer.refusals:  # the forward caught it
            raise CaptureError(tracer.refusals[0])
    except Exception as problem:
        before.restore()
        why = reason(problem)
        text = f"torch.fx cannot trace {type(root).__name__}.forward"
        raise CaptureError(f"{text}: {why}" if why else f"{KEPT}; {text}") from problem
    finally:
        own.discard(tracer)
    changed = before.restore()
    if changed:
        raise CaptureError(f"the forward changes {', '.join(changed)} as it runs")
    for node in graph.find_nodes(op="placeholder"):
        if str(node.target).startswith("**") and node.users:
            raise CaptureError(f"the forward looks into its {node.target}, which differ from call to call")
    resolve_annotations(root, graph)
    return Trace(graph, tracer.opaque)


class Flag:
    """Stands for ``module.training`` during a trace: an argument of an operation, never a condition.

    Arguments:
        target: the attribute that the graph reads.
        tracer: of the trace.
    """

    def __init__(self, target: str, tracer: _Tracer) -> None:
        self.target, self.tracer = target, tracer

    def __bool__(self) -> bool:
        self.tracer.refuse("its forward decides by self.training")
        raise AssertionError

    def _compare(self, other: object) -> bool:
        return bool(self)

    __eq__ = __ne__ = __and__ = __or__ = __invert__ = __int__ = _compare
    __hash__ = None  # type: ignore[assignment]


@contextlib.contextmanager
def _flags(tracer: _Tracer) -> Iterator[None]:
    """Put a `Flag` in place of each module's training flag, and the flags back."""
    former: list[tuple[dict[str, Any], Any, Flag]] = []
    try:
        for module, path in tracer.paths.items():
            attributes = vars(module)
            if "training" in attributes:
                flag = Flag(f"{path}.training" if path else "training", tracer)
                former.append((attributes, attributes["training"], flag))
                attributes["training"] = flag
        yield
    finally:
        changed = False
        for attributes, training, flag in former:
            changed = changed or attributes.get("training") is not flag
            attributes["training"] = training
        if changed:
            tracer.refusals.append("its forward changes a training flag")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, inside: set[str]) -> None:
        super().__init__()
        self.inside = inside
        self.opaque: dict[str, str] = {}
        self.paths: dict[nn.Module, str] = {}
        self.tensors: dict[Tensor, str] = {}
        self.stored: dict[nn.Module, list[Any]] = {}
        for path, module in root.named_modules():
            self.paths.setdefault(module, path)
            self.stored[module] = [*module._parameters.values(), *module._buffers.values()]
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    self.tensors.setdefault(tensor, f"{path}.{name}" if path else name)
            if path in inside:
                why = question(module)
                if why:
                    self.opaque[path] = why
        self.proxies: dict[str, fx.Proxy] = {}
        self.refusals: list[str] = []
        self.ambient: tuple[Any, ...] = ()
        self.modes = 0
        self.thread = threading.get_ident()

    def refuse(self, message: str) -> None:
        """Raise, and remember it in case the forward catches exceptions."""
        self.refusals.append(message)
        raise CaptureError(message)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if ambient_state() != self.ambient or function_modes() > self.modes:
            self.refuse(
                "its forward runs an operation in another mode (gradients, inference, autocast, default dtype or "
                "device, hooks of saved tensors, autograd.Function), which a graph does not show"
            )
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

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
        if threading.get_ident() != self.thread:  # torch.fx records calls of all threads
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
            self.opaque[path] = reason(problem) or KEPT
        return self._called(m, forward, args, kwargs)

    def _called(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_call(m)
        path = self.paths[m]
        if has_own_forward(m) and path in self.inside:  # it takes no computed tensors
            self.refuse(f"the forward of {path} was replaced on the object itself: {self.opaque[path]}")
        if any(map(self._has_other_tensors, m.modules())):
            self.refuse(f"its forward calls {path} with other tensors than the model's, which a graph does not show")
        variable = "" if type(m).__module__.startswith("torch.nn.") else tests_result()
        if variable:
            self.refuse(f"whether {variable}, which {path} returns, is None is known only when the model runs")
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(m, nn.MultiheadAttention) and (*args[4:5], kwargs.get("need_weights"))[0] is False:
            return result[0], None
        return result

    def _has_other_tensors(self, module: nn.Module) -> bool:
        known, now = self.stored.get(module), [*module._parameters.values(), *module._buffers.values()]
        return known is None or len(known) != len(now) or not all(map(operator.is_, known, now))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread or not isinstance(attr_val, Tensor):
            return attr_val
        return self.value_of(attr_val)

    def value_of(self, tensor: Tensor) -> fx.Proxy:
        """Return the value that reads a tensor of the model; one for each trace."""
        if tensor not in self.tensors:
            self.refuse("its forward uses a tensor that is neither a parameter nor a buffer")
        return self.read(self.tensors[tensor])

    def read(self, target: str) -> fx.Proxy:
        """Return the value that reads an attribute of the model."""
        if target not in self.proxies:
            self.proxies[target] = self.create_proxy("get_attr", target, (), {})
        return self.proxies[target]

    def create_arg(self, a: Any) -> Any:
        kind = type(a)  # `isinstance` would ask a value for its class
        if issubclass(kind, (Value, Attribute)):
            return a.node
        if kind is Flag:
            return self.read(a.target).node
        if isinstance(a, Tensor):
            return self.value_of(a).node
        if isinstance(a, nn.Module):
            self.refuse(f"its forward passes a module ({kind.__name__}) as an argument")
        if isinstance(a, (dict, list)) and kind.__module__ != "builtins" and "torch.fx" not in kind.__module__:
            self.refuse(f"its forward makes a {kind.__name__}, of which a graph keeps the items only")
        return super().create_arg(a)
