"""Which functions, methods and attributes a stored graph may name; everything else is refused.

A model file is read as data. This table separates data from a program: it lists functions that compute on tensors.
None of them reads or writes files, imports, evaluates text, or calls an object that it is given.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from rewriter._torch import OpOverload, OpOverloadPacket, nn_functions, operator_names, tensor_functions
from rewriter.errors import ModelFileError

F = TypeVar("F", bound=Callable[..., Any])

_registered: dict[str, Callable[..., Any]] = {}

_OPERATOR = """
    abs add and_ concat contains countOf eq floordiv ge getitem gt iadd iand iconcat ifloordiv
    ilshift imatmul imod imul index indexOf inv invert ior ipow irshift is_ is_not isub itruediv
    ixor le lshift lt matmul mod mul ne neg not_ or_ pos pow rshift setitem sub truediv truth xor
""".split()
_BUILTINS = """
    abs bool float int len list pow range round slice sum tuple
""".split()
_TORCH = """
    arange as_strided as_tensor asarray broadcast_shapes empty empty_like empty_strided eye finfo
    full full_like iinfo is_grad_enabled is_tensor linspace logspace normal ones ones_like
    promote_types rand rand_like randint randint_like randn randn_like randperm result_type
    scalar_tensor sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum tensor
    tril_indices triu_indices vander zeros zeros_like _assert
""".split()
_FUNCTIONAL = """
    celu_ elu_ hardsigmoid hardswish hardtanh_ leaky_relu_ relu_ rrelu_ selu_ sigmoid tanh
    threshold_ upsample upsample_bilinear upsample_nearest
""".split()
_DENIED_OPERATORS = frozenset({"from_file", "_from_blob", "_print", "record_stream", "set_data"})
_DENIED_FUNCTIONS = frozenset({"from_file", "frombuffer", "from_numpy", "from_dlpack", "to_dlpack"})
_DENIED_FUNCTIONS |= {"triplet_margin_with_distance_loss"}  # calls its argument

_DENIED_METHODS = frozenset(
    """
    record_stream set_ set_data to_padded_tensor unsafe_chunk unsafe_split unsafe_split_with_sizes
    """.split()
)
_FURTHER_METHODS = frozenset(
    """
    append bfloat16 bool byte cdouble cfloat char copy count cpu cuda dim_order double element_size
    endswith extend float get half index insert int items keys long ndimension nelement new
    new_tensor pop reverse short startswith to_sparse_coo tolist type unique update values
    """.split()
)
"""Methods of tensors that are no operators, and methods of lists, dicts and texts."""
_ATTRIBUTES = frozenset(
    """
    H T data device dtype grad imag is_cpu is_cuda is_leaf is_meta is_mps is_nested is_quantized
    is_sparse is_sparse_csr is_xpu itemsize layout mH mT nbytes ndim real requires_grad shape
    bits eps index indices max min resolution smallest_normal start step stop tiny type values
    """.split()
)
"""Attributes of tensors, and of what their methods return: devices, named tuples, numeric limits, slices."""

_OVERLOAD = re.compile(r"torch\.ops\.(aten|prims)\.([A-Za-z_]\w*)(?:\.([A-Za-z_]\w*))?", re.ASCII)


def graph_function(function: F) -> F:
    """Let graphs of saved models call `function`, a module-level function of this package.

    >>> from rewriter.serialization import graph_function
    >>> @graph_function
    ... def scaled(x: torch.Tensor) -> torch.Tensor:
    ...     return 2 * x
    """
    _registered[f"{function.__module__}:{function.__qualname__}"] = function
    return function


def name_of_function(function: Callable[..., Any]) -> str | None:
    """Return the stored name of a function that every reader accepts, ``None`` for another function."""
    if isinstance(function, (OpOverload, OpOverloadPacket)):
        name = f"torch.ops.{function}"
        return name if _operator(name) is not None else None
    try:
        known = _names().get(function)
    except TypeError:
        return None
    if known is not None:
        return known
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    return name if _registered.get(name) is function else None


def function_named(name: str) -> Callable[..., Any]:
    """Return the function a stored graph calls `name`.

    Raises:
        ModelFileError: it is not on the list of functions that compute on tensors.
    """
    found = _functions().get(name) or _operator(name) or _own(name)
    if found is None:
        raise ModelFileError(
            f"the graph calls {name!r}, which is no function that a model file may call "
            "(torch's tensor functions, operator, math)"
        )
    return found


def is_registered(function: Any) -> bool:
    """Return whether `function` is one of this package's own graph functions."""
    return any(function is known for known in _registered.values())


def is_allowed_method(name: str) -> bool:
    """Return whether a stored graph may call the method `name`: a tensor operator, or a listed method."""
    if name in _FURTHER_METHODS:
        return True
    return _is_public(name) and name in _operator_methods() and name not in _DENIED_METHODS


def is_allowed_attribute(name: str) -> bool:
    """Return whether a stored graph may read the attribute `name`."""
    return name in _ATTRIBUTES


@functools.lru_cache(maxsize=1)
def _operator_methods() -> frozenset[str]:
    operators = {name.partition("::")[2].partition(".")[0] for name in _operators()}
    return frozenset(name for name in operators if callable(getattr(torch.Tensor, name, None)))


def _is_public(name: str) -> bool:
    return name.isidentifier() and name.isascii() and not name.startswith("_")


def _candidates() -> Iterator[tuple[str, Callable[..., Any]]]:
    # The first name a function is seen under is the one it is stored under.
    overridable = torch.overrides.get_overridable_functions()
    computing = {function for owner, found in overridable.items() if owner is not torch.Tensor for function in found}
    for name in _OPERATOR:
        yield f"operator.{name}", getattr(operator, name)
    for name in _BUILTINS:
        yield f"builtins.{name}", getattr(builtins, name)
    yield "builtins.getattr", getattr
    for name, value in vars(math).items():
        if callable(value) and _is_public(name):
            yield f"math.{name}", value
    for name in _TORCH:
        if hasattr(torch, name):
            yield f"torch.{name}", getattr(torch, name)
    for name in _FUNCTIONAL:
        if hasattr(torch.nn.functional, name):
            yield f"torch.nn.functional.{name}", getattr(torch.nn.functional, name)
    namespaces = (
        "torch",
        "torch.nn.functional",
        "torch.linalg",
        "torch.fft",
        "torch.special",
        "torch.nn.init",
    )
    for namespace in namespaces:
        module = importlib.import_module(namespace)
        for name, value in vars(module).items():
            if _is_public(name) and _is_computing(value, computing):
                yield f"{namespace}.{name}", value
    for name in ("pack_padded_sequence", "pack_sequence", "pad_packed_sequence", "pad_sequence"):
        yield f"torch.nn.utils.rnn.{name}", getattr(torch.nn.utils.rnn, name)
    for name in dir(tensor_functions):
        if _is_public(name) or name == "_weight_norm":
            yield f"torch._VF.{name}", getattr(tensor_functions, name)
    for name in dir(nn_functions):
        if _is_public(name):
            yield f"torch._C._nn.{name}", getattr(nn_functions, name)


def _is_computing(function: Any, computing: set[Callable[..., Any]]) -> bool:
    try:
        return function in computing
    except TypeError:
        return False


@functools.lru_cache(maxsize=1)
def _functions() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {}
    for name, function in _candidates():
        if name.rpartition(".")[2] not in _DENIED_FUNCTIONS:
            table.setdefault(name, function)
    return table


@functools.lru_cache(maxsize=1)
def _names() -> dict[Callable[..., Any], str]:
    table: dict[Callable[..., Any], str] = {}
    for name, function in _functions().items():
        table.setdefault(function, name)
    return table


def _operator(name: str) -> Callable[..., Any] | None:
    match = _OVERLOAD.fullmatch(name)
    if match is None or match[2].startswith("__") or match[2] in _DENIED_OPERATORS:
        return None
    namespace, packet_name, overload = match.groups()
    known = f"{namespace}::{packet_name}" + (f".{overload}" if overload and overload != "default" else "")
    # TorchScript-only operators (aten::save writes a file) are absent from the dispatcher's list.
    if overload is None:
        if not any(op == known or op.startswith(known + ".") for op in _operators()):
            return None
    elif known not in _operators():
        return None
    packet = getattr(getattr(torch.ops, namespace), packet_name, None)
    found = packet if overload is None else getattr(packet, overload, None)
    return found if isinstance(found, (OpOverload, OpOverloadPacket)) else None


@functools.lru_cache(maxsize=1)
def _operators() -> frozenset[str]:
    names = operator_names()
    return frozenset(name for name in names if name.startswith(("aten::", "prims::")))


def _own(name: str) -> Callable[..., Any] | None:
    module, colon, _ = name.partition(":")
    if colon and name not in _registered and is_own_module(module):
        try:
            importlib.import_module(module)
        except ImportError:
            return None
    return _registered.get(name)


def is_own_module(name: str) -> bool:
    """Return whether `name` is the dotted name of a module of this package that a file may import."""
    return (
        re.fullmatch(r"rewriter(\.(?!__|cli\b|demo\b(?!\._network$))[A-Za-z_][A-Za-z0-9_]*)*", name, re.ASCII)
        is not None
    )
