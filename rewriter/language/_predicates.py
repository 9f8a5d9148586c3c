"""The single questions that a selector asks about a tensor."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rewriter.language._glob import Glob
from rewriter.language._tensors import TensorInfo

LONGEST_REGEX = 500

_DTYPES = (
    "float16 float32 float64 bfloat16 float8_e4m3fn float8_e5m2 bool complex32 complex64 complex128 "
    "int8 int16 int32 int64 uint8 uint16 uint32 uint64"
).split()
_ALIASES = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "short": "int16",
    "int": "int32",
    "long": "int64",
    "cfloat": "complex64",
    "cdouble": "complex128",
}
DTYPES = {**{name: name for name in _DTYPES}, **_ALIASES}
"""Every dtype a spec may name, and what torch calls it."""

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_EXTENT = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*([0-9]{1,18})\s*")


@dataclass(frozen=True, slots=True)
class Extent:
    """What one dimension's size may be: ``3``, ``"*"``, ``">=64"``."""

    sign: str
    size: int

    @classmethod
    def read(cls, written: int | str) -> Extent:
        """Read a size or a comparison.

        Raises:
            ValueError: it is neither.
        """
        if isinstance(written, int):
            if written < 0:
                raise ValueError(f"a size cannot be negative, found {written}")
            return cls("==", written)
        if written.strip() == "*":
            return cls(">=", 0)
        parts = _EXTENT.fullmatch(written)
        if parts is None:
            raise ValueError(f"a size is written 3, '*', '>=64', '<=8', '==4' or '!=1', found {written!r}")
        return cls(parts[1], int(parts[2]))

    def admits(self, size: int) -> bool:
        return _COMPARISONS[self.sign](size, self.size)


@dataclass(frozen=True, slots=True)
class Path:
    glob: Glob
    owner_too: bool = False

    def holds(self, info: TensorInfo) -> bool:
        return self.glob.matches(info.name) or (self.owner_too and self.glob.matches(info.owner))


@dataclass(frozen=True, slots=True)
class Regex:
    pattern: re.Pattern[str]

    def holds(self, info: TensorInfo) -> bool:
        return self.pattern.fullmatch(info.name) is not None


@dataclass(frozen=True, slots=True)
class OwnerClass:
    name: str

    def holds(self, info: TensorInfo) -> bool:
        return self.name in info.module_classes


@dataclass(frozen=True, slots=True)
class TensorName:
    glob: Glob

    def holds(self, info: TensorInfo) -> bool:
        return self.glob.matches(info.tensor)


@dataclass(frozen=True, slots=True)
class Kind:
    kind: str

    def holds(self, info: TensorInfo) -> bool:
        return info.kind == self.kind


@dataclass(frozen=True, slots=True)
class Rank:
    extent: Extent

    def holds(self, info: TensorInfo) -> bool:
        return self.extent.admits(info.ndim)


@dataclass(frozen=True, slots=True)
class Shape:
    extents: tuple[Extent, ...]

    def holds(self, info: TensorInfo) -> bool:
        return len(self.extents) == info.ndim and all(
            extent.admits(size) for extent, size in zip(self.extents, info.shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Dtype:
    name: str

    def holds(self, info: TensorInfo) -> bool:
        return info.dtype.removeprefix("torch.") == self.name


@dataclass(frozen=True, slots=True)
class RequiresGrad:
    wanted: bool

    def holds(self, info: TensorInfo) -> bool:
        return info.requires_grad == self.wanted


Predicate = Path | Regex | OwnerClass | TensorName | Kind | Rank | Shape | Dtype | RequiresGrad


def read_regex(written: str) -> re.Pattern[str]:
    """Compile a user's regular expression.

    Raises:
        ValueError: it is too long or malformed.
    """
    if len(written) > LONGEST_REGEX:
        raise ValueError(f"a regex of {len(written)} characters; at most {LONGEST_REGEX} are read")
    try:
        return re.compile(written)
    except (re.error, OverflowError, RecursionError) as wrong:
        raise ValueError(f"not a regular expression: {wrong}") from wrong


def read_dtype(written: str) -> str:
    """Return the dtype's own name for ``torch.half``, ``half`` or ``float16``.

    Raises:
        KeyError: there is no such dtype.
    """
    return DTYPES[written.removeprefix("torch.")]


PREDICATES: dict[str, Callable[[Any], Predicate]] = {
    "path": lambda written: Path(Glob(written)),
    "regex": lambda written: Regex(read_regex(written)),
    "module": OwnerClass,
    "tensor": lambda written: TensorName(Glob(written)),
    "kind": Kind,
    "ndim": lambda written: Rank(Extent.read(written)),
    "shape": lambda written: Shape(tuple(Extent.read(size) for size in written)),
    "dtype": lambda written: Dtype(read_dtype(written)),
    "requires_grad": RequiresGrad,
}
"""What makes a predicate of each key of a selector's mapping."""
