"""Safetensors headers: the names, shapes and places of tensors, checked before any of them is believed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rewriter.errors import ModelFileError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000
"""The format's own limit, in bytes."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Arguments:
        name: its key.
        dtype, shape: its form.
        file: the file.
        start: the offset of its first byte in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Arguments:
        file: the file.
        tensors: in the order of their bytes.
        metadata: the file's own texts, ``__metadata__``.
        size: of the file in bytes.
    """

    file: Path
    tensors: tuple[Stored, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    size: int = 0


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file; the tensors are not read.

    Raises:
        ModelFileError: the file is missing, cut off, or its header does not describe its bytes.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise _damaged(file, f"{size} bytes hold no header of {length} bytes; it is cut off or no safetensors")
            text = opened.read(length)
    except OSError as problem:
        raise ModelFileError(f"{file} cannot be read: {problem.strerror or problem}") from problem
    found = parsed(text, file)
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "its __metadata__ is no mapping of texts")
    tensors = sorted((_stored(file, name, entry, 8 + length) for name, entry in found.items()), key=_place)
    _check_places(file, tensors, 8 + length, size)
    return Header(file, tuple(tensors), metadata, size)


def header_bytes(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the start of a safetensors file whose tensors follow in this order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape in tensors:
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parsed(text: bytes, file: Path) -> dict[str, Any]:
    """Return a JSON object that has no key twice.

    Raises:
        ModelFileError: it is something else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise _damaged(file, f"it has the key {twice!r} twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as problem:
        raise _damaged(file, f"it is no JSON: {problem}") from problem
    if not isinstance(found, dict):
        raise _damaged(file, "it is no JSON object")
    return found


def _stored(file: Path, name: str, entry: Any, data: int) -> Stored:
    check_name(file, name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"its entry of {name!r} does not consist of dtype, shape and data_offsets")
    dtype, shape, places = DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise ModelFileError(f"{file}: {name!r} has the dtype {entry['dtype']!r}, which torch does not have")
    if not _sizes(shape) or not _sizes(places) or len(places) != 2:
        raise _damaged(file, f"the shape or the offsets of {name!r} are no lists of sizes")
    wanted = math.prod(shape) * dtype.itemsize
    if places[1] - places[0] != wanted:
        raise _damaged(file, f"{name!r} of shape {shape} takes {wanted} bytes, and its offsets are {places}")
    return Stored(name, dtype, tuple(shape), file, data + places[0])


def check_name(file: Path, name: str) -> None:
    """Refuse a key that is a path and not the name of a tensor."""
    if not name or "\0" in name or name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
        raise _damaged(file, f"{name!r} is no name of a tensor")


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _place(stored: Stored) -> tuple[int, int]:
    return stored.start, stored.nbytes


def _check_places(file: Path, tensors: Sequence[Stored], data: int, size: int) -> None:
    """Refuse tensors that overlap, leave bytes between them, or end elsewhere than the file."""
    end, before = data, "the header"
    for stored in tensors:
        if stored.start != end:
            what = "overlaps" if stored.start < end else "leaves a gap after"
            raise _damaged(file, f"{stored.name!r} {what} {before}")
        end, before = stored.start + stored.nbytes, repr(stored.name)
    if end != size:
        what = "is cut off" if end > size else "has bytes that no tensor owns"
        raise _damaged(file, f"it {what}: its tensors end at byte {end}, and it has {size}")


def _damaged(file: Path, text: str) -> ModelFileError:
    return ModelFileError(f"{os.fspath(file)} is damaged: {text}")
