"""Other tracers: what `torch.fx.symbolic_trace` makes of a model that is rewritten.

A stock tracer looks into every module that is not torch's own, where it would find the value of a chain and write it
down as a constant: a graph that runs, and trains nothing. So a rewritten model writes its own graph into the tracer's,
with each site as one node, and a site that is met in any other way says what to do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch.compiler import is_compiling

from rewriter._torch import is_fx_symbolic_tracing
from rewriter.bindings._late_changes import refuse_replaced, refuse_sharded_parts
from rewriter.context._tracers import ordinary
from rewriter.sites._site import Site


def traceable(forward: Callable[..., Any], quick: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward that torch.fx wrote for a graph, made to write the graph down where a tracer calls it.

    Arguments:
        forward: for compilers.
        quick: the same, for Python.
    """

    @functools.wraps(forward)
    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracer = _tracer_of((args, kwargs)) if is_fx_symbolic_tracing() else None
        if tracer is None:
            try:
                if is_compiling():
                    return forward(self, *args, **kwargs)
                self.refuse_overridden()
                if not ordinary() or not self.validated.sites:
                    return quick(self, *args, **kwargs)
                return self.validated.run(quick, self, *args, **kwargs)
            except AttributeError:
                refuse_replaced(self)
                raise
            except RuntimeError:
                if not is_compiling():
                    refuse_sharded_parts(self)
                raise
        given = inspect.signature(forward).bind(self, *args, **kwargs)
        given.apply_defaults()
        return _Copy(self, tracer, list(given.arguments.values())[1:]).run()

    return traced


class _Copy(fx.Interpreter):
    """Runs a graph of values of another tracer, which writes down what is done to them."""

    def __init__(self, model: Any, tracer: fx.Tracer, given: Sequence[Any]) -> None:
        from rewriter.passes import lower

        super().__init__(model, graph=lower(model, model.captured, model.sites))
        self.tracer = tracer
        self.given = iter(given)  # in the order of the placeholders, which make the signature

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return next(self.given)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if _tracer_of((args, kwargs)) is None:
            return super().call_function(target, args, dict(kwargs))
        return self.tracer.create_proxy("call_function", target, args, dict(kwargs))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, Site):
            return module(*args, **kwargs)
        return self.tracer.create_proxy("call_module", self.tracer.path_of_module(module), args, dict(kwargs))


def _tracer_of(values: Any) -> Any:
    """Return the tracer of the first of the values that stands for one of a later run; ``None`` where none does."""
    found: list[Any] = []
    fx.node.map_aggregate(values, lambda value: found.append(value) if isinstance(value, fx.Proxy) else None)
    return found[0].tracer if found else None
