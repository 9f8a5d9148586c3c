"""Symbolic tracing that refuses rather than records something else than what the model does.

torch.fx runs a forward once and writes down what it saw. What it cannot see it bakes in: the training flag, random
tensors, attributes that a forward sets. Here each of these is either made visible or makes the module a node of its
own, which runs as it is.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewriter.errors import CaptureError

_FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "zeros",
)  # fmt: skip


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
    for name in ("graph", "code"):
        if name in root._modules or name in root._parameters or name in root._buffers:
            raise CaptureError(f"the model has a submodule or tensor called {name!r}, a name that graphs use")
    optional = _absent_by_default(root)
    with _restored_containers(root):
        traced = _trace_once(root, inside, {})
        if optional and _outline(traced.graph) != _outline(_trace_once(root, inside, optional).graph):
            raise CaptureError(
                f"what {type(root).__name__}.forward does depends on whether {' or '.join(optional)} is None"
            )
    return traced


def _trace_once(root: nn.Module, inside: set[str], concrete: dict[str, Any]) -> Trace:
    tracer = _Tracer(root, inside)
    try:
        with _training_visible(tracer, root), _factories_recorded(tracer), _assignments_refused():
            graph = tracer.trace(root, concrete_args=concrete or None)
    except Exception as problem:
        raise CaptureError(f"torch.fx cannot trace {type(root).__name__}.forward: {_reason(problem)}") from problem
    for node in graph.nodes:
        if isinstance(node.type, str):
            # An annotation that is still text reaches generated code in a form that TorchScript cannot read.
            node.type = None
    return Trace(graph, tracer.opaque)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, inside: set[str]) -> None:
        super().__init__()
        self.inside = inside
        self.opaque: dict[str, str] = {}
        self.paths: dict[nn.Module, str] = {}
        for path, module in root.named_modules():
            self.paths.setdefault(module, path)
        self.tensors: dict[Tensor, str] = {}
        for path, module in root.named_modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    self.tensors.setdefault(tensor, f"{path}.{name}" if path else name)
        self.proxies: dict[str, fx.Proxy] = {}

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
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)))
        known = dict(self.proxies)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as problem:
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.proxies = known
            self.opaque[path] = _reason(problem)
            return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor) and attr_val in self.tensors:
            return self.read(self.tensors[attr_val])
        return attr_val

    def read(self, target: str) -> fx.Proxy:
        """Return the proxy of the node that reads `target`; one for each trace."""
        if target not in self.proxies:
            self.proxies[target] = self.create_proxy("get_attr", target, (), {})
        return self.proxies[target]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, fx.Proxy):
            if a not in self.tensors:
                raise CaptureError("its forward uses a tensor that is neither a parameter nor a buffer")
            return self.read(self.tensors[a]).node
        if isinstance(a, nn.Module):
            raise CaptureError(f"its forward passes a module ({type(a).__name__}) as an argument")
        return super().create_arg(a)


@contextlib.contextmanager
def _factories_recorded(tracer: _Tracer) -> Iterator[None]:
    """Make ``torch.zeros(...)`` and its like nodes of the graph: sizes may be proxies, and random ones stay random."""
    originals = {name: getattr(torch, name) for name in _FACTORIES}

    def recorder(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_function", function, args, kwargs)

        return record

    try:
        for name, function in originals.items():
            setattr(torch, name, recorder(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


@contextlib.contextmanager
def _training_visible(tracer: _Tracer, root: nn.Module) -> Iterator[None]:
    """Make ``self.training`` a node, so that ``train()`` and ``eval()`` still decide after capture.

    A forward that branches on it is refused by torch.fx: a proxy has no truth value.
    """
    modules = {path: module for path, module in root.named_modules() if path in tracer.inside or not path}
    flags = {path: module.__dict__.pop("training") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            # torch.fx asks its own copy of Module.__getattr__, which finds buffers: the flag stands in as one.
            flag = torch.tensor(flags[path])
            tracer.tensors[flag] = f"{path}.training" if path else "training"
            module._buffers["training"] = flag
        yield
    finally:
        for path, module in modules.items():
            module._buffers.pop("training", None)
            module.__dict__["training"] = flags[path]


@contextlib.contextmanager
def _assignments_refused() -> Iterator[None]:
    """Refuse a forward that sets attributes: the graph would not, and the model would be left with proxies."""
    assign = nn.Module.__setattr__

    def refuse(module: nn.Module, name: str, value: Any) -> None:
        raise CaptureError(f"its forward sets self.{name}")

    try:
        nn.Module.__setattr__ = refuse  # type: ignore[assignment,method-assign]
        yield
    finally:
        nn.Module.__setattr__ = assign  # type: ignore[method-assign]


@contextlib.contextmanager
def _restored_containers(root: nn.Module) -> Iterator[None]:
    """Refuse a forward that appends to its lists and dicts, and take out again what it put there."""
    kept: list[tuple[Any, Any, str]] = []
    for module in root.modules():
        for name, value in module.__dict__.items():
            if type(value) in (list, dict, set) and not name.startswith("_"):
                kept.append((value, value.copy(), f"{type(module).__name__}.{name}"))
    yield
    changed = []
    for value, former, name in kept:
        if len(value) != len(former) or value != former:
            changed.append(name)
            value.clear()
            value.extend(former) if isinstance(value, list) else value.update(former)
    if changed:
        raise CaptureError(f"the forward changes {', '.join(changed)} as it runs")


def _absent_by_default(root: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(root).forward).parameters.values()
    return {parameter.name: None for parameter in parameters if parameter.default is None}


def _outline(graph: fx.Graph) -> list[tuple[str, Any]]:
    return [
        (node.op, node.target)
        for node in graph.nodes
        if node.op != "placeholder" and getattr(node.target, "__name__", "") not in ("_assert_is_none", "eq", "_assert")
    ]


def _reason(problem: BaseException) -> str:
    """Say why tracing failed, with the line of the user's forward where it did."""
    lines = str(problem).strip().splitlines()
    text = lines[0] if lines else type(problem).__name__
    for frame in reversed(traceback.extract_tb(problem.__traceback__)):
        if "/torch/" not in frame.filename and not frame.filename.startswith("<") and frame.filename != __file__:
            return f"{text} (at {frame.filename}:{frame.lineno}: `{frame.line}`)"
    return text
