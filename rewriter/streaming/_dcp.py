"""Folders of torch.distributed.checkpoint: the tensors of the model, each in pieces; no code of a pickle runs."""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import ModelFileError
from rewriter.streaming._header import Header, Stored, check_name

METADATA = ".metadata"
ENTRIES = ("model", "state_dict", "model_state_dict")
"""Where a training checkpoint has its model; without any of them, the whole is the model."""
SHARD = 5 * 10**9
"""The size of an output shard in bytes, as transformers writes it."""

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: where it belongs, and where torch.save's bytes of it are."""

    offsets: Offsets
    sizes: Offsets
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class Pieces(Stored):
    """A tensor that lies in several pieces."""

    pieces: tuple[Piece, ...] = ()

    def read(self) -> Tensor:
        """Return the tensor.

        Raises:
            ModelFileError: a piece is damaged or of another form.
        """
        whole = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            try:
                with piece.file.open("rb") as file:
                    file.seek(piece.start)
                    content = io.BytesIO(file.read(piece.length))
                found = torch.load(content, map_location="cpu", weights_only=True)
                place = tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.sizes, strict=True))
                if found.dtype != self.dtype or tuple(found.shape) != piece.sizes:
                    raise ValueError(f"{found.dtype} of shape {list(found.shape)}")
                whole[place] = found
            except Exception as problem:
                reason = str(problem).partition("\n")[0]
                raise ModelFileError(f"{piece.file}: a piece of {self.name!r} is damaged: {reason}") from problem
        return whole


def is_dcp(folder: Path) -> bool:
    """Whether torch.distributed.checkpoint wrote a folder."""
    return (folder / METADATA).is_file()


def dcp_headers(folder: Path) -> tuple[Header, ...]:
    """Return the tensors of the model as shards that can be written.

    Raises:
        ModelFileError: the metadata is damaged, or names files or bytes that are not there.
    """
    try:
        tensors = list(_tensors(folder, _Reader(io.BytesIO((folder / METADATA).read_bytes())).load()))
    except ModelFileError:
        raise
    except Exception as problem:
        raise ModelFileError(f"{folder / METADATA} is damaged: {type(problem).__name__}: {problem}") from problem
    if not tensors:
        raise ModelFileError(f"{folder} has no tensors")
    groups: list[list[Pieces]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(one.nbytes for one in groups[-1]) + tensor.nbytes > SHARD:
            groups.append([])
        groups[-1].append(tensor)
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    files = [folder / name for name in (names if len(names) > 1 else ["model.safetensors"])]
    return tuple(
        Header(file, tuple(group), {"format": "pt"}, sum(one.nbytes for one in group))
        for file, group in zip(files, groups, strict=True)
    )


def _tensors(folder: Path, metadata: Any) -> Iterator[Pieces]:
    found: Mapping[str, Any] = metadata.state_dict_metadata
    places = {
        (index.fqn, tuple(index.__dict__.get("offset") or ())): info for index, info in metadata.storage_data.items()
    }
    prefix = next((f"{entry}." for entry in ENTRIES if any(name.startswith(f"{entry}.") for name in found)), "")
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    for name, entry in found.items():
        if name.startswith(prefix) and hasattr(entry, "chunks"):
            check_name(folder / METADATA, name)
            shape, dtype = _sizes(entry.size), entry.properties.__dict__["state"][0]
            pieces = [_piece(folder, name, chunk, places, sizes) for chunk in entry.chunks]
            _check_cover(folder, name, shape, pieces)
            yield Pieces(name.removeprefix(prefix), dtype, shape, folder / METADATA, 0, tuple(pieces))


def _piece(
    folder: Path, name: str, chunk: Any, places: Mapping[tuple[str, Offsets], Any], sizes: Mapping[str, int]
) -> Piece:
    offsets = _sizes(chunk.offsets)
    info = places.get((name, offsets)) or places[name, ()]
    if info.__dict__.get("transform_descriptors"):
        raise ModelFileError(f"{folder}: {name!r} is stored compressed, which reparam does not read")
    file, start, length = info.relative_path, int(info.offset), int(info.length)
    if os.path.basename(file) != file or min(start, length) < 0 or start + length > sizes.get(file, -1):
        raise ModelFileError(
            f"{folder} is damaged: {name!r} is at {start} of {file!r}, {length} bytes that are not there"
        )
    return Piece(offsets, _sizes(chunk.sizes), folder / file, start, length)


def _sizes(value: Any) -> Offsets:
    found = tuple(value)
    if not all(type(size) is int and size >= 0 for size in found):
        raise ValueError(f"{found!r:.80} is no shape")
    return found


def _check_cover(folder: Path, name: str, shape: Offsets, pieces: Sequence[Piece]) -> None:
    """Refuse pieces that overlap, or that are not the whole tensor."""
    inside = all(
        len(piece.offsets) == len(piece.sizes) == len(shape)
        and all(at + size <= whole for at, size, whole in zip(piece.offsets, piece.sizes, shape, strict=True))
        for piece in pieces
    )
    if not inside or sum(math.prod(piece.sizes) for piece in pieces) != math.prod(shape):
        raise ModelFileError(f"{folder} is damaged: the pieces of {name!r} are not the whole of {list(shape)}")
    for one, other in itertools.combinations(pieces, 2):
        pairs = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
        if all(a < b + n and b < a + m for a, m, b, n in pairs):
            raise ModelFileError(f"{folder} is damaged: two pieces of {name!r} overlap")


class _Record:
    """What stands for every class of torch.distributed.checkpoint: attributes and no behaviour."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def _text(*parts: Any) -> str:
    return "/".join(map(str, parts))


class _Reader(pickle.Unpickler):
    """Reads a pickle in which every name stands for something without behaviour; any other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"):
            return _Record
        found: Any = torch.__dict__.get(name) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        known: dict[tuple[str, str], Any] = {
            ("torch", "Size"): tuple,
            ("torch.serialization", "_get_layout"): _text,
            ("pathlib", "PosixPath"): _text,
            ("pathlib", "PurePosixPath"): _text,
            ("pathlib._local", "PosixPath"): _text,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in known:
            raise ModelFileError(f"the metadata asks for {module}.{name}, which no checkpoint of a model needs")
        return known[module, name]
