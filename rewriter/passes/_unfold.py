"""unfold: every evaluation becomes the steps of its chain, for reading and for TorchScript."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from rewriter.errors import CaptureError
from rewriter.passes._infra import Lowering
from rewriter.passes._lower import Writer
from rewriter.sites import PASSED, Chunked, Site
from rewriter.sites._steps import apply_chain

if TYPE_CHECKING:
    from rewriter.bindings import RewrittenModule


def unfolded(model: RewrittenModule) -> fx.GraphModule:
    """Return the graph of `model` with the steps of its chains as nodes, over the same tensors.

    The result has no caching node, so no policy that decides at run time: it evaluates each chain where its node
    stands.
    """
    lowering = Lowering(model, fx.Graph(), model.sites)
    _Unfolder(lowering, model.captured).write()
    return fx.GraphModule(model, lowering.graph, class_name=type(model).__name__)


def scriptable(model: RewrittenModule) -> fx.GraphModule:
    """Return what TorchScript compiles in place of `model`.

    Raises:
        CaptureError: a called module takes its tensors by name, which TorchScript cannot express.
    """
    plain = unfolded(model)
    for node in plain.graph.nodes:
        if PASSED in node.kwargs:
            kind = type(model.get_submodule(node.target)).__name__
            raise CaptureError(
                f"{node.target} ({kind}) takes its computed tensors by name, which TorchScript cannot express; "
                "bake() the model first"
            )
    return plain


class _Unfolder(Writer):
    def evaluate(self, site: Site, inputs: Sequence[Any]) -> Any:
        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        path = self.lowering.paths[site]
        originals: list[Any] = [
            tracer.create_proxy("get_attr", f"{path}.{name}", (), {}) for name in site.original_names
        ]
        given: list[Any] = [fx.Proxy(read, tracer) for read in inputs]
        steps = [_recorded(tracer, step, f"{path}.{index}") for index, step in enumerate(site.steps)]
        value = apply_chain(site.spec, steps, originals, given)
        return tuple(member.node for member in value) if isinstance(value, tuple) else value.node

    def _member(self, site: Site, value: Any, index: int) -> Any:
        return value[index]


def _recorded(tracer: fx.proxy.GraphAppendingTracer, step: nn.Module, path: str) -> Callable[..., Any]:
    """Return a function that writes a call of `step` into the graph; one call for each chunk if it has several."""
    if not isinstance(step, Chunked):
        return lambda *args: tracer.create_proxy("call_module", path, args, {})

    def each(*args: Any) -> Any:
        calls: list[Any] = [
            tracer.create_proxy("call_module", f"{path}.{chunk}", tuple(tensor[chunk] for tensor in args), {})
            for chunk in range(len(step))
        ]
        return torch.stack(calls)

    return each
