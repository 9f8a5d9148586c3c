"""The files that will be written: every tensor with its place, decided before the first byte."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewriter.sites._container import path_for
from rewriter.streaming._checkpoint import CHAINS, FORMS, Checkpoint, read_tensor
from rewriter.streaming._dcp import Pieces
from rewriter.streaming._header import Header, Stored, header_bytes, parsed


@dataclass(frozen=True)
class Output:
    """A tensor of the output, copied from `source` or, without one, computed."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: Stored | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Work:
    """Tensors that are computed together, and what they replace.

    Arguments:
        name: what a message calls it.
        replaces: the stored tensors that the output has no longer.
        reads: the stored tensors that it is computed from.
        outputs: what is written instead, in the order in which `run` returns it.
        run: computes the outputs, each as blocks of rows that follow each other: the whole tensor, or parts of whole
            pages (see `Checksum`).
        aliases: further names of the outputs → the name of each in the file.
        records: what the file says of it, by the key of the metadata and a name.
        nbytes: what it holds in memory, intermediate results aside; by default, what it reads and what it writes.
    """

    name: str
    replaces: Sequence[Stored]
    reads: Sequence[Stored]
    outputs: Sequence[Output]
    run: Callable[[], Iterable[Iterable[Tensor]]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    records: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    nbytes: int = -1

    def __post_init__(self) -> None:
        if self.nbytes < 0:
            both: list[Stored | Output] = [*self.reads, *self.outputs]
            object.__setattr__(self, "nbytes", sum(map(_in_memory, both)))


def _in_memory(one: Stored | Output) -> int:
    """Return the size of a tensor; numbers of two bytes and less are computed in four."""
    return math.prod(one.shape) * max(one.dtype.itemsize, 4)


@dataclass
class Shard:
    """A file that will be written.

    Arguments:
        file: its name.
        outputs: its tensors in order.
        work: what computes some of them.
        metadata: its texts.
    """

    file: str
    outputs: list[Output] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def header(self) -> bytes:
        """Return the start of the file."""
        return header_bytes([(one.name, one.dtype, one.shape) for one in self.outputs], self.metadata)

    def places(self) -> dict[str, int]:
        """Return where each tensor starts in the file."""
        sizes = [len(self.header()), *(one.nbytes for one in self.outputs)]
        return dict(zip([one.name for one in self.outputs], itertools.accumulate(sizes), strict=False))

    @property
    def nbytes(self) -> int:
        """The size of its tensors."""
        return sum(one.nbytes for one in self.outputs)


def shards_of(checkpoint: Checkpoint, work: Iterable[Work]) -> list[Shard]:
    """Return the shards of the output: those of the input, with what is computed in the place of what it replaces."""
    at: dict[str, list[Work]] = defaultdict(list)
    replaced: set[str] = set()
    names: set[str] = set()
    for one in work:
        names |= {one.name, path_for(one.name)}
        at[(*one.replaces, *one.reads)[0].name].append(one)
        replaced.update(stored.name for stored in one.replaces)
    shards = [_shard(header, at, replaced) for header in checkpoint.shards]
    for shard, header in zip(shards, checkpoint.shards, strict=True):
        _keep_texts(shard, header, checkpoint.aliases, replaced, names)
    return shards


def _keep_texts(shard: Shard, header: Header, tied: Mapping[str, str], replaced: set[str], names: set[str]) -> None:
    """Keep what the input's file says of tensors that stay."""
    for key, text in header.metadata.items():
        if key in (CHAINS, FORMS):
            old = {name: record for name, record in parsed(text.encode(), header.file).items() if name not in names}
            found = {**old, **json.loads(shard.metadata.get(key, "{}"))}
            if found:
                shard.metadata[key] = json.dumps(found, sort_keys=True)
        elif not (key in tied and text in replaced):
            shard.metadata.setdefault(key, text)


def _gathering(stored: Stored, output: Output) -> Work:
    return Work(stored.name, [stored], [stored], [output], lambda: [[read_tensor(stored)]])


def _shard(header: Header, at: Mapping[str, list[Work]], replaced: set[str]) -> Shard:
    shard = Shard(header.file.name)
    records: dict[str, dict[str, object]] = defaultdict(dict)
    for stored in header.tensors:
        if stored.name not in replaced:
            output = Output(stored.name, stored.dtype, stored.shape, None if isinstance(stored, Pieces) else stored)
            shard.outputs.append(output)
            if output.source is None:
                shard.work.append(_gathering(stored, output))
        for one in at.get(stored.name, ()):
            shard.work.append(one)
            shard.outputs += one.outputs
            shard.metadata.update(one.aliases)
            for key, record in one.records.items():
                records[key].update(record)
    shard.metadata.update({key: json.dumps(record, sort_keys=True) for key, record in records.items()})
    return shard
