"""unfold: every caching node becomes the steps that it runs, for reading and for TorchScript."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from rewriter.errors import CaptureError
from rewriter.runtime import HANDED, ParametrizedTensor, RewrittenModule
from rewriter.runtime._tensor import apply_chain


def unfolded(model: RewrittenModule) -> fx.GraphModule:
    """Return the graph of `model` with the chains as nodes of their own, over the same tensors.

    The result holds no caching node and so no policy that decides at run time: it evaluates each chain where its node
    stands.
    """
    graph = fx.Graph()
    done: dict[fx.Node, Any] = {}
    for node in model.graph.nodes:
        site = _site(model, node)
        if site is None:
            done[node] = graph.node_copy(node, lambda old: done[old])
        else:
            done[node] = _unfold(graph, site, str(node.target), [done[read] for read in node.args])
    return fx.GraphModule(model, graph, class_name=type(model).__name__)


def scriptable(model: RewrittenModule) -> fx.GraphModule:
    """Return what TorchScript compiles in place of `model`.

    Raises:
        CaptureError: a module of the graph is handed its tensors by name, which TorchScript has no way to say.
    """
    for node in model.graph.nodes:
        if HANDED in node.kwargs:
            kind = type(model.get_submodule(node.target)).__name__
            raise CaptureError(
                f"{node.target} ({kind}) is handed its computed tensors by name, which cannot be scripted; "
                "bake() the model first"
            )
    return unfolded(model)


def _site(model: RewrittenModule, node: fx.Node) -> ParametrizedTensor | None:
    if node.op != "call_module":
        return None
    module = model.get_submodule(str(node.target))
    return module if isinstance(module, ParametrizedTensor) else None


def _unfold(graph: fx.Graph, site: ParametrizedTensor, path: str, inputs: list[Any]) -> Any:
    tracer = fx.proxy.GraphAppendingTracer(graph)

    def recorded(index: int) -> Callable[..., Any]:
        return lambda *args: tracer.create_proxy("call_module", f"{path}.{index}", args, {})

    originals: list[Any] = [tracer.create_proxy("get_attr", f"{path}.{name}", (), {}) for name in site.original_names]
    given: list[Any] = [fx.Proxy(read, tracer) for read in inputs]
    steps = [recorded(index) for index in range(len(site.record.chain))]
    value = apply_chain(site.record, steps, originals, given)
    if isinstance(value, tuple):
        return tuple(member.node for member in value)
    return value.node
