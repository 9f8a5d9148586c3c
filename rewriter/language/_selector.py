"""Selectors: which tensors of a model a rule is about."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainSerializer, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from rewriter.language._forms import Forms, OrAbsent
from rewriter.language._glob import compiled
from rewriter.language._tensors import TensorInfo
from rewriter.language._value import Value, plain

LONGEST_REGEX = 500
DOTTED = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"
_NAMES = (
    "float16 float32 float64 bfloat16 float8_e4m3fn float8_e5m2 bool complex32 complex64 complex128 "
    "int8 int16 int32 int64 uint8 uint16 uint32 uint64"
).split()
DTYPES = {name: name for name in _NAMES} | {
    "half": "float16", "float": "float32", "double": "float64", "short": "int16", "int": "int32", "long": "int64",
    "cfloat": "complex64", "cdouble": "complex128",
}  # fmt: skip
"""Every dtype a spec may name, and its canonical name in torch."""

_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_SIZE = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*([0-9]{1,18})\s*")


@functools.lru_cache(maxsize=1024)
def _size_test(written: int | str) -> tuple[Callable[[int, int], bool], int]:
    """Read a size such as ``3``, ``"*"`` or ``">=64"``: what compares, and with which number."""
    if isinstance(written, int):
        if written < 0:
            raise ValueError(f"a size cannot be negative, found {written}")
        return operator.eq, written
    if written.strip() == "*":
        return operator.ge, 0
    parts = _SIZE.fullmatch(written)
    if parts is None:
        raise ValueError(f"a size is written 3, '*', '>=64', '<=8', '==4' or '!=1', found {written!r}")
    return _COMPARISONS[parts[1]], int(parts[2])


def _admits(written: int | str, size: int) -> bool:
    compare, bound = _size_test(written)
    return compare(size, bound)


@functools.lru_cache(maxsize=1024)
def _regex(written: str) -> re.Pattern[str]:
    if len(written) > LONGEST_REGEX:
        raise ValueError(f"a regex of {len(written)} characters; at most {LONGEST_REGEX} are read")
    try:
        return re.compile(written)
    except (re.error, OverflowError, RecursionError) as wrong:
        raise ValueError(f"not a regular expression: {wrong}") from wrong


def _dtype(written: str) -> str:
    if written.removeprefix("torch.") not in DTYPES:
        raise PydanticCustomError("unknown_choice", "must be a dtype such as 'float32'", {"choices": list(DTYPES)})
    return DTYPES[written.removeprefix("torch.")]


def _readable(read: Callable[[Any], object]) -> AfterValidator:
    """Return the check that `read` accepts a value, which stays as it is written."""

    def check(written: Any) -> Any:
        read(written)
        return written

    return AfterValidator(check)


GlobText = Annotated[str, _readable(compiled)]
Size = Annotated[int | str, Forms(number=int, text=str), _readable(_size_test)]


class Predicates(Value):
    """Predicates that must all hold."""

    path: OrAbsent[GlobText] = Field(default=None, examples=["blocks.*.attn.{q,k,v}.weight"])
    """A dotted glob over the full name: `*` inside a segment, `**` across segments, `{a,b}` alternates. With
    a `tensor` key, or in a rule with `joint`, it may name the owning module instead."""
    regex: OrAbsent[Annotated[str, _readable(_regex)]] = None
    """A Python regular expression that matches the full name from start to end."""
    module: OrAbsent[Annotated[str, Field(pattern=DOTTED)]] = Field(
        default=None, examples=["Linear", "torch.nn.Linear"]
    )
    """The owning module's class, bare or dotted; subclasses match."""
    tensor: OrAbsent[GlobText] = Field(default=None, examples=["weight"])
    """A glob over the tensor's own name in its module."""
    kind: OrAbsent[Literal["parameter", "buffer"]] = None
    """Whether the tensor is a parameter or a buffer."""
    ndim: OrAbsent[Size] = Field(default=None, examples=[2, ">=2"])
    """The number of dimensions, or a comparison."""
    shape: OrAbsent[tuple[Size, ...]] = Field(default=None, examples=[[">=64", "*"]])
    """One entry for each dimension: a size, `*`, or a comparison such as `>=64`, `<=8`, `==4`, `!=1`."""
    dtype: OrAbsent[Annotated[str, AfterValidator(_dtype)]] = Field(default=None, examples=["float32"])
    """The dtype, with or without `torch.`."""
    requires_grad: OrAbsent[bool] = None
    """Whether the tensor requires a gradient."""

    _path_may_name_owner: bool = PrivateAttr(False)

    @model_validator(mode="after")
    def _says_something(self) -> Predicates:
        if not self.model_fields_set:
            raise ValueError("a selector without predicates would match everything; write `**` if that is meant")
        self._path_may_name_owner = self.tensor is not None
        return self

    def matches(self, info: TensorInfo) -> bool:
        """Return whether every predicate that is given holds for the tensor."""
        return (
            (self.path is None or self._names(compiled(self.path), info))
            and (self.regex is None or _regex(self.regex).fullmatch(info.name) is not None)
            and (self.module is None or self.module in info.module_classes)
            and (self.tensor is None or compiled(self.tensor).fullmatch(info.tensor) is not None)
            and (self.kind is None or self.kind == info.kind)
            and (self.ndim is None or _admits(self.ndim, info.ndim))
            and (self.shape is None or (len(self.shape) == info.ndim and all(map(_admits, self.shape, info.shape))))
            and (self.dtype is None or self.dtype == info.dtype.removeprefix("torch."))
            and (self.requires_grad is None or self.requires_grad == info.requires_grad)
        )

    def _names(self, path: re.Pattern[str], info: TensorInfo) -> bool:
        names_tensor = path.fullmatch(info.name) is not None
        return names_tensor or (self._path_may_name_owner and path.fullmatch(info.owner) is not None)

    def written(self) -> str | dict[str, Any]:
        """Return what a spec says: the pattern alone, or a mapping."""
        keys: dict[str, Any] = plain(self.model_dump(exclude_unset=True))
        return str(self.path) if keys.keys() == {"path"} else keys

    def __str__(self) -> str:
        return _shown(self.written())


@dataclass(frozen=True, slots=True)
class Selector:
    """Says of each tensor whether it is meant: one of the alternatives matches.

    >>> wanted = Selector((Predicates(path="blocks.*.q.weight"), Predicates(tensor="bias", ndim=1)))
    >>> wanted.matches(TensorInfo("blocks.3.q.weight"))
    True
    >>> str(wanted)
    '[blocks.*.q.weight, {tensor: bias, ndim: 1}]'
    """

    alternatives: tuple[Predicates, ...]

    def matches(self, info: TensorInfo) -> bool:
        """Return whether any alternative matches the tensor."""
        return any(alternative.matches(info) for alternative in self.alternatives)

    def with_owners(self) -> None:
        """Let every `path` name the owning module too, as it does in a rule with `joint`."""
        for alternative in self.alternatives:
            alternative._path_may_name_owner = True

    def written(self) -> Any:
        """Return what a spec says: a pattern, a mapping, or a list of both."""
        written = [alternative.written() for alternative in self.alternatives]
        return written if len(written) != 1 else written[0]

    def __str__(self) -> str:
        return _shown(self.written())


def _predicates(written: str | Predicates) -> Predicates:
    return Predicates(path=written) if isinstance(written, str) else written


def _selector(written: str | Predicates | tuple[Predicates, ...]) -> Selector:
    return Selector(written if isinstance(written, tuple) else (_predicates(written),))


_Entry = Annotated[Predicates, Forms(text=GlobText, mapping=Predicates), AfterValidator(_predicates)]
WrittenSelector = Annotated[
    Selector,
    Forms(text=GlobText, mapping=Predicates, list=Annotated[tuple[_Entry, ...], Field(min_length=1)]),
    AfterValidator(_selector),
    PlainSerializer(Selector.written),
]
"""A glob, a mapping of predicates, or a list of both."""


def _shown(written: Any) -> str:
    if isinstance(written, dict):
        return "{" + ", ".join(f"{key}: {_shown(value)}" for key, value in written.items()) + "}"
    if isinstance(written, list):
        return "[" + ", ".join(map(_shown, written)) + "]"
    return str(written).lower() if isinstance(written, bool) else str(written)
