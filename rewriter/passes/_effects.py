"""Which nodes of a graph may write to a tensor that was there before.

torch names its in-place functions: `add_`, `operator.iadd`, `setitem`, or an argument `out=` or `inplace=True`. A
function or module of anybody else may write to whatever it gets.
"""

from __future__ import annotations

import operator

from torch import fx, nn

from rewriter.capture import has_hooks, is_torch_leaf
from rewriter.passes._infra import Lowering
from rewriter.sites import Site

_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in vars(operator) if name.startswith("i") and hasattr(operator, f"__{name}__")
) | {operator.setitem, operator.delitem}
_VIEWS = frozenset(
    """
    T chunk contiguous detach expand expand_as flatten getitem mT movedim narrow permute real reshape select split
    squeeze swapaxes t to transpose type_as unbind unflatten unsqueeze view view_as
    broadcast_to double float half mH tensor_split diagonal H imag swapdims
    """.split()
)
_VIEW_MODULES = frozenset({nn.Dropout, nn.Flatten, nn.Identity, nn.Unflatten})


def may_write(lowering: Lowering, node: fx.Node) -> bool:
    """Say whether a node may write to a tensor that it is given."""
    if node.op == "call_function":
        return _is_in_place(node) or not _is_torchs(node.target)
    if node.op == "call_method":
        return _is_in_place(node)
    if node.op != "call_module":
        return False
    module = lowering.module(node.target)
    if isinstance(module, Site):
        return False
    quiet = is_torch_leaf(module) and not has_hooks(module) and not getattr(module, "inplace", False)
    # A recurrent or composite layer calls others; an embedding with max_norm writes to its weight.
    return not quiet or bool(module._modules) or getattr(module, "max_norm", None) is not None


def is_read_only(lowering: Lowering, node: fx.Node) -> bool:
    """Say whether no use of the node's value, or of a view of it, may write to it or return it."""
    return all(
        user.op != "output"
        and not may_write(lowering, user)
        and (not _is_view(lowering, user) or is_read_only(lowering, user))
        for user in node.users
    )


def _is_in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    if node.target in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")) or name == "__setitem__":
        return True
    # `inplace` and `out` say where the result goes; a True among the arguments may be `inplace`.
    return bool(node.kwargs.keys() & {"inplace", "out"}) or any(argument is True for argument in node.args)


def _is_torchs(function: object) -> bool:
    home = getattr(function, "__module__", None) or ""
    return (
        function is getattr or home.partition(".")[0] in ("torch", "_operator", "math") or home.startswith("rewriter.")
    )


def _is_view(lowering: Lowering, node: fx.Node) -> bool:
    """Say whether the node's value may share memory with its arguments."""
    if node.op == "call_module":
        return type(lowering.module(node.target)) in _VIEW_MODULES
    if node.target is getattr:
        return node.args[1] in _VIEWS
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _VIEWS or "dropout" in name
