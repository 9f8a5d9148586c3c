"""What torch's own functions do while a forward is traced, also those that get no traced value."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from rewriter._torch import pytree, set_grad_enabled
from rewriter.capture._value import FACTORIES, Value


class Recorder(TorchFunctionMode):
    """Writes every call of a torch function into the graph.

    A factory (``torch.rand(4)``) becomes a node, so that its sizes may be values and a random tensor stays random.
    A parameter that was reached in another way than as an attribute (``next(self.parameters())``) becomes a value.

    Arguments:
        tracer: writes the graph.
    """

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is set_grad_enabled:
            self.tracer.refuse("its forward changes the grad mode, which a graph does not show")
        found: list[Value] = []

        def value(argument: Any) -> Any:
            if isinstance(argument, Tensor):
                argument = self.tracer.value_of(argument)
            if isinstance(argument, fx.Proxy):
                found.append(argument)  # type: ignore[arg-type]
            return argument

        args, kwargs = fx.node.map_aggregate((tuple(args), dict(kwargs or {})), value)
        if found:
            if getattr(func, "__name__", "") == "__get__":
                return getattr(args[0], func.__self__.__name__)
            return Value.__torch_function__(func, types, args, dict(kwargs))
        if getattr(func, "__name__", "") in FACTORIES:  # not executed: it may draw random numbers
            return self.tracer.create_proxy("call_function", func, args, dict(kwargs))
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return self.tracer.create_proxy("call_function", func, args, dict(kwargs))
        return result
