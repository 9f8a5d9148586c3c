"""unfold: every caching node becomes the steps that it runs, for reading and for TorchScript."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from rewriter.errors import CaptureError
from rewriter.passes._batch import is_batch
from rewriter.passes._transpose import TRANSPOSED
from rewriter.runtime import HANDED, Chunked, ParametrizedTensor, RewrittenModule
from rewriter.runtime._rows import written_by_rows
from rewriter.runtime._steps import apply_chain


def unfolded(model: RewrittenModule) -> fx.GraphModule:
    """Return the graph of `model` with the chains as nodes of their own, over the same tensors.

    The result holds no caching node and so no policy that decides at run time: it evaluates each chain where its node
    stands.
    """
    graph = fx.Graph()
    done: dict[fx.Node, Any] = {}
    for node in model.graph.nodes:
        if is_batch(model, node):
            continue
        site = _site(model, node)
        if site is None:
            done[node] = graph.node_copy(node, lambda old: done[old])
        else:
            value = _unfold(graph, site, str(node.target), [done[read] for read in node.args])
            done[node] = graph.call_method("t", (value,)) if TRANSPOSED in node.kwargs else value
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
    plain = unfolded(model)
    if written_by_rows(plain.graph):  # TorchScript knows no modules among the arguments
        plain.recompile()
    return plain


def _site(model: RewrittenModule, node: fx.Node) -> ParametrizedTensor | None:
    if node.op != "call_module":
        return None
    module = model.get_submodule(str(node.target))
    return module if isinstance(module, ParametrizedTensor) else None


def _unfold(graph: fx.Graph, site: ParametrizedTensor, path: str, inputs: list[Any]) -> Any:
    tracer = fx.proxy.GraphAppendingTracer(graph)

    originals: list[Any] = [tracer.create_proxy("get_attr", f"{path}.{name}", (), {}) for name in site.original_names]
    given: list[Any] = [fx.Proxy(read, tracer) for read in inputs]
    steps = [_recorded(tracer, step, f"{path}.{index}") for index, step in enumerate(site.steps)]
    value = apply_chain(site.record, steps, originals, given)
    if isinstance(value, tuple):
        return tuple(member.node for member in value)
    return value.node


def _recorded(tracer: fx.proxy.GraphAppendingTracer, step: nn.Module, path: str) -> Callable[..., Any]:
    """Return a function that writes a call of `step` into the graph; one call for each chunk where it has several."""
    if not isinstance(step, Chunked):
        return lambda *args: tracer.create_proxy("call_module", path, args, {})

    def each(*args: Any) -> Any:
        calls: list[Any] = [
            tracer.create_proxy("call_module", f"{path}.{chunk}", tuple(tensor[chunk] for tensor in args), {})
            for chunk in range(len(step))
        ]
        return torch.stack(calls)

    return each
