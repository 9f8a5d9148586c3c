"""A checkpoint on disk: its shards, tensors and the files beside them, known from headers alone."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import ModelFileError
from rewriter.streaming._checksum import PAGE
from rewriter.streaming._dcp import Pieces, dcp_headers, is_dcp
from rewriter.streaming._header import Header, Stored, check_name, parsed, read_header

INDEX = ".safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pt2", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp")
BLOCK = 1 << 22
"""The size of a block of rows in bytes: it stays in the processor's cache from reading to writing."""
CHAINS = "reparam"
"""The key of a file's metadata with the identity of each chain, by the path of its site."""
FORMS = "reparam.tensors"
"""The key with the names, shapes and dtypes of computed tensors, by the tensor's first name."""


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors files that are one set of weights.

    Arguments:
        path: the file or folder.
        shards: the headers, in the order of the file names.
        index: the name of the shard index, if there is one.
        index_metadata: what the index says beside the names.
        others: files to copy: configuration, tokenizer.
    """

    path: Path
    shards: tuple[Header, ...]
    index: str = ""
    index_metadata: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[Path, ...] = ()
    tensors: dict[str, Stored] = field(init=False)
    aliases: dict[str, str] = field(init=False)
    """Names of tied tensors → the name under which the tensor is stored."""

    def __post_init__(self) -> None:
        tensors = {stored.name: stored for shard in self.shards for stored in shard.tensors}
        object.__setattr__(self, "tensors", tensors)
        texts = [item for shard in self.shards for item in shard.metadata.items()]
        tied = {name: kept for name, kept in texts if kept in tensors and name not in tensors and name != "format"}
        object.__setattr__(self, "aliases", tied)

    @property
    def is_file(self) -> bool:
        """Whether it is one file and no folder."""
        return not self.path.is_dir() and not self.index

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def recorded(self, key: str) -> dict[str, Any]:
        """Return what the metadata of the files says under `CHAINS` or `FORMS`.

        Raises:
            ModelFileError: it is no mapping.
        """
        found: dict[str, Any] = {}
        for shard in self.shards:
            if key in shard.metadata:
                found.update(parsed(shard.metadata[key].encode(), shard.file))
        return found


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a safetensors file, of the shards of an index, or of a folder that may be of DCP.

    Raises:
        ModelFileError: a file is missing or damaged, or the index and the shards contradict each other.
    """
    if path.is_dir():
        return _folder(path)
    if path.name.endswith(INDEX):
        return _indexed(path, path)
    if not path.exists():
        raise ModelFileError(f"{path} does not exist")
    return Checkpoint(path, (read_header(path),))


def _folder(folder: Path) -> Checkpoint:
    if is_dcp(folder):
        shards = dcp_headers(folder)
        index = f"model{INDEX}" if len(shards) > 1 else ""
        return Checkpoint(folder, shards, index, others=_others(folder))
    found = sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob(f"*{INDEX}"))
    if len(indexes) > 1:
        raise ModelFileError(f"{folder} has several indexes: {_names(indexes)}; name the one to read")
    if indexes:
        return _indexed(indexes[0], folder)
    usual = [file for file in found if file.name == "model.safetensors"] or found
    if not usual:
        raise ModelFileError(f"{folder} has no safetensors file")
    if len(usual) > 1:
        raise ModelFileError(f"{folder} has several safetensors files and no index: {_names(usual)}; name one")
    return Checkpoint(folder, (read_header(usual[0]),), others=_others(folder))


def _indexed(index: Path, path: Path) -> Checkpoint:
    folder = index.parent
    try:
        found = parsed(index.read_bytes(), index)
    except OSError as problem:
        raise ModelFileError(f"{index} cannot be read: {problem.strerror or problem}") from problem
    places, metadata = found.get("weight_map"), found.get("metadata", {})
    if not isinstance(places, dict) or not places or not isinstance(metadata, dict):
        raise ModelFileError(f"{index} is damaged: it has no weight_map of names and files")
    for name, file in places.items():
        check_name(index, name)
        if not isinstance(file, str) or not file.endswith(".safetensors") or os.path.basename(file) != file:
            raise ModelFileError(f"{index} is damaged: {name!r} is in {file!r}, which is no file of its folder")
    shards = tuple(read_header(folder / file) for file in sorted(set(places.values())))
    _check_index(index, places, shards)
    return Checkpoint(path, shards, index.name, metadata, _others(folder))


def _check_index(index: Path, places: Mapping[str, str], shards: Iterable[Header]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for stored in shard.tensors:
            if stored.name in seen:
                raise ModelFileError(f"{stored.name!r} is in {seen[stored.name]} and in {shard.file.name}")
            seen[stored.name] = shard.file.name
    for name in {**places, **seen}:
        if places.get(name) != seen.get(name):
            said, there = places.get(name, "no file"), seen.get(name, "no shard of the index")
            raise ModelFileError(f"{index} says that {name!r} is in {said}, and it is in {there}")


def _others(folder: Path) -> tuple[Path, ...]:
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    return tuple(file for file in files if not file.name.endswith((*WEIGHTS, INDEX, ".bin.index.json")))


def _names(files: Iterable[Path]) -> str:
    return ", ".join(file.name for file in files)


def read_tensor(stored: Stored) -> Tensor:
    """Read one tensor into memory of its own. A mapped file would count as memory until it is closed.

    Raises:
        ModelFileError: the file is shorter than its header said when it was checked.
    """
    if isinstance(stored, Pieces):
        return stored.read()
    with _opened(stored) as file:
        return _read(file, stored, stored.start, torch.empty(stored.shape, dtype=stored.dtype))


def read_rows(stored: Stored) -> Iterator[tuple[int, Tensor]]:
    """Read one tensor in blocks of rows that are whole pages, and yield each with the number of its first row.

    The next block overwrites the memory of the one before.

    Raises:
        ModelFileError: as `read_tensor`.
    """
    if isinstance(stored, Pieces) or stored.nbytes <= BLOCK:
        yield 0, read_tensor(stored)
        return
    (rows, *inner), row = stored.shape, stored.nbytes // stored.shape[0]
    whole = PAGE // math.gcd(PAGE, row)  # so many rows end where a page ends
    count = whole * max(1, BLOCK // (whole * row))
    block = torch.empty((min(count, rows), *inner), dtype=stored.dtype)
    with _opened(stored) as file:
        for first in range(0, rows, count):
            yield first, _read(file, stored, stored.start + first * row, block[: rows - first])


@contextlib.contextmanager
def _opened(stored: Stored) -> Iterator[int]:
    try:
        with stored.file.open("rb", buffering=0) as file:
            yield file.fileno()
    except OSError as problem:
        raise ModelFileError(f"{stored.file} cannot be read: {problem.strerror or problem}") from problem


def _read(file: int, stored: Stored, start: int, content: Tensor) -> Tensor:
    """Fill a tensor with the bytes from `start` on, and return it."""
    if not content.numel():
        return content
    view, done = content.reshape(-1).view(torch.uint8).numpy().data, 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], start + done)
        if not count:
            raise ModelFileError(f"{stored.file} became shorter while it was read")
        done += count
    return content


def index_text(metadata: Mapping[str, Any], places: Mapping[str, str], nbytes: int) -> str:
    """Return a shard index as transformers writes it."""
    found = {"metadata": {**metadata, "total_size": nbytes}, "weight_map": dict(places)}
    return json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
