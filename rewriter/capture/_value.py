"""The proxy for a value while a forward is traced, and what writes calls of torch's functions down.

`torch.fx.Proxy` accepts a few things that the graph then does differently: it records `x += y` as a new sum, it loses
an attribute that is set, and it answers `isinstance` about itself instead of the value.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from rewriter._torch import pytree, set_grad_enabled

_SLOTS = frozenset({"tracer", "node", "root", "attr", "_node"})
_FIELDS = frozenset(
    "eigenvalues eigenvectors Q R U S V Vh L P LU pivots sign logabsdet solution residuals rank singular_values".split()
) | frozenset(PackedSequence._fields)
_ASKS_SAFELY = ("torch.fx.", "torch.nn.parameter", "torch.overrides", "torch.utils._pytree", "rewriter.")
FACTORIES = frozenset(
    "arange as_tensor empty eye full linspace logspace normal ones rand randint randn randperm scalar_tensor tensor "
    "zeros full_like rand_like randn_like randint_like".split()
)


class Value(fx.Proxy):
    """A value of the forward that is traced."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # `isinstance` and `match` read this if the type itself does not match. torch parses arguments with it too,
        # in the frame that calls `torch.full((2,), size)`.
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") in ("abc", "_py_abc") and frame.f_back is not None:
            frame = frame.f_back
        asks = frame.f_code.co_names
        if not str(frame.f_globals.get("__name__")).startswith(_ASKS_SAFELY) and (
            "isinstance" in asks or FACTORIES.isdisjoint(asks)
        ):
            self._refuse("asks for the type of a value that is not known yet")
        return type(self)

    def _refuse(self, what: str) -> None:
        self.tracer.refuse(f"its forward {what}")  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _SLOTS:
            self._refuse(f"sets .{name} of an intermediate value")
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Attribute:
        if name.startswith("__"):
            raise AttributeError(name)
        if not hasattr(torch.Tensor, name) and name not in _FIELDS and self.node.op != "call_module":
            self._refuse(f"asks a value for .{name}, which tensors do not have")
        return ValueAttribute(self, name)

    def __hash__(self) -> int:
        self._refuse("looks an intermediate value up in a dict or set")
        raise AssertionError

    def __len__(self) -> int:
        self._refuse("takes len() of an intermediate value; use .size(0)")
        raise AssertionError

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.Proxy:
        self._refuse("copies an intermediate value with copy.deepcopy; use .clone()")
        raise AssertionError

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class ValueAttribute(Attribute, Value):
    """``value.name``, which becomes a node when it is used as a value rather than called."""

    __hash__ = Value.__hash__

    def __getattr__(self, name: str) -> Attribute:
        if name.startswith("__"):
            raise AttributeError(name)
        return ValueAttribute(self, name)


def _in_place(name: str) -> Any:
    plain, in_place = getattr(operator, name), getattr(operator, f"i{name.rstrip('_')}")

    def operate(self: Any, other: Any) -> Any:
        kind = _kind(self.node)
        if kind == "unknown":
            self._refuse(f"changes in place what may be a tensor or a number ({self.node.name})")
        # A number is a new one each time; torch.fx would write `n += 1`, and change what else reads `n`.
        return self.tracer.create_proxy("call_function", plain if kind == "number" else in_place, (self, other), {})

    return operate


for _name in "add and_ floordiv lshift matmul mod mul or_ pow rshift sub truediv xor".split():
    setattr(Value, f"__i{_name.rstrip('_')}__", _in_place(_name))

_NUMBERS = frozenset(
    "dim element_size get_device item ndimension nelement numel size storage_offset stride tolist "
    "device dtype itemsize nbytes ndim shape".split()
)


def _kind(node: fx.Node) -> str:
    """Return whether a value is a tensor, a number (a size, a list of sizes), or unknown."""
    if node.op == "placeholder":
        annotation = str(getattr(node.type, "__name__", node.type))
        return "tensor" if "Tensor" in annotation else "number" if annotation in ("int", "float") else "unknown"
    name = node.args[1] if node.target is getattr else node.target
    if name in _NUMBERS and node.op in ("call_method", "call_function"):
        return "number"
    if getattr(node.target, "__module__", "") in ("_operator", "builtins", "math") and node.target is not getattr:
        kinds = {_kind(source) for source in node.all_input_nodes}
        return next(kind for kind in ("tensor", "unknown", "number") if kind in kinds)
    return "tensor"


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
