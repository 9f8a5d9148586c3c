"""The stand-in for a value while a forward is recorded.

torch.fx's own Proxy lets a few things pass that the graph then does otherwise: `x += y` is recorded as a sum of its
own, an attribute that is set is lost, and a look-up in a dict finds nothing.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx.proxy import Attribute

TENSOR, SCALAR, UNKNOWN = "tensor", "scalar", "unknown"

_IN_PLACE = {
    "__iadd__": ("add_", operator.add),
    "__isub__": ("sub_", operator.sub),
    "__imul__": ("mul_", operator.mul),
    "__itruediv__": ("div_", operator.truediv),
    "__ifloordiv__": ("floor_divide_", operator.floordiv),
    "__imod__": ("remainder_", operator.mod),
    "__ipow__": ("pow_", operator.pow),
    "__iand__": ("bitwise_and_", operator.and_),
    "__ior__": ("bitwise_or_", operator.or_),
    "__ixor__": ("bitwise_xor_", operator.xor),
}
_SLOTS = frozenset({"tracer", "node", "root", "attr", "_node"})


class Value(fx.Proxy):
    """A value of the forward that is being recorded."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _SLOTS:
            self.tracer.refuse(f"its forward sets .{name} of an intermediate value")  # type: ignore[attr-defined]
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Attribute:
        return ValueAttribute(self, name)

    def __hash__(self) -> int:
        self.tracer.refuse("its forward looks an intermediate value up in a dict or set")  # type: ignore[attr-defined]
        raise AssertionError

    def __len__(self) -> int:
        self.tracer.refuse("its forward takes len() of an intermediate value; use .size(0)")  # type: ignore[attr-defined]
        raise AssertionError

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.Proxy:
        self.tracer.refuse("its forward copies an intermediate value with copy.deepcopy; use .clone()")  # type: ignore[attr-defined]
        raise AssertionError

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class ValueAttribute(Attribute, Value):
    """``value.name``, which becomes a node when it is used as a value rather than called."""

    __hash__ = Value.__hash__


def _in_place(method: str, plain: Any) -> Any:
    def operate(self: Any, other: Any) -> Any:
        kind = kind_of(self.node)
        if kind == SCALAR:
            return plain(self, other)
        if kind == UNKNOWN:
            self.tracer.refuse(f"its forward changes what may be a tensor or a number ({self.node.name}) in place")
        return self.tracer.create_proxy("call_method", method, (self, other), {})

    return operate


for _name, (_method, _plain) in _IN_PLACE.items():
    setattr(Value, _name, _in_place(_method, _plain))

_KIND = "reparam_kind"
_SCALAR_METHODS = frozenset(
    """
    data_ptr dim element_size get_device is_complex is_contiguous is_floating_point item ndimension nelement numel size
    storage_offset stride tolist type
    """.split()
)
_SCALAR_ATTRIBUTES = frozenset(
    "device dtype is_cuda is_leaf itemsize layout names nbytes ndim requires_grad shape".split()
)
_TENSOR_ATTRIBUTES = frozenset("H T data grad imag mH mT real".split())
_SCALAR_MODULES = frozenset({"builtins", "math"})


def remember_kind(node: fx.Node) -> None:
    """Work out whether a node's value is a tensor, from what its inputs are known to be."""
    node.meta[_KIND] = _kind(node)


def kind_of(node: fx.Node) -> str:
    """Return ``"tensor"``, ``"scalar"`` (a number, a size, a dtype) or ``"unknown"``."""
    return str(node.meta.get(_KIND, UNKNOWN))


def forget_kinds(graph: fx.Graph) -> None:
    """Take what was remembered out of the graph's metadata."""
    for node in graph.nodes:
        node.meta.pop(_KIND, None)


def _kind(node: fx.Node) -> str:
    if node.op == "placeholder":
        return _kind_of_input(node)
    if node.op == "call_method":
        return SCALAR if node.target in _SCALAR_METHODS else TENSOR
    if node.op != "call_function":
        return TENSOR
    if node.target is getattr:
        name = node.args[1]
        return SCALAR if name in _SCALAR_ATTRIBUTES else TENSOR if name in _TENSOR_ATTRIBUTES else UNKNOWN
    module = getattr(node.target, "__module__", "") or ""
    if node.target is operator.getitem:
        return kind_of(node.args[0]) if isinstance(node.args[0], fx.Node) else UNKNOWN
    if module == "_operator":
        kinds = {kind_of(source) for source in node.all_input_nodes}
        return TENSOR if TENSOR in kinds else UNKNOWN if UNKNOWN in kinds else SCALAR
    return SCALAR if module in _SCALAR_MODULES else TENSOR


def _kind_of_input(node: fx.Node) -> str:
    annotation = str(getattr(node.type, "__name__", node.type))
    if "Tensor" in annotation:
        return TENSOR
    numeric = annotation in ("int", "float", "bool") or (node.args and isinstance(node.args[0], (int, float)))
    return SCALAR if numeric else UNKNOWN
