"""The files that will be written: every tensor with its place, decided before the first byte."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewriter.streaming._checkpoint import RECORDS, Checkpoint
from rewriter.streaming._header import Header, Stored, header_bytes


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
        run: computes the outputs.
        aliases: further names of the outputs → the name of each in the file.
        record: what the file says of it.
    """

    name: str
    replaces: Sequence[Stored]
    reads: Sequence[Stored]
    outputs: Sequence[Output]
    run: Callable[[], Sequence[Tensor]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, object] | None = None

    @property
    def nbytes(self) -> int:
        """What it holds in memory, intermediate results aside."""
        return sum(one.nbytes for one in self.reads) + sum(one.nbytes for one in self.outputs)


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

    @property
    def nbytes(self) -> int:
        """The size of its tensors."""
        return sum(one.nbytes for one in self.outputs)


def shards_of(checkpoint: Checkpoint, work: Iterable[Work]) -> list[Shard]:
    """Return the shards of the output: those of the input, with what is computed in the place of what it replaces."""
    at: dict[str, list[Work]] = defaultdict(list)
    replaced: set[str] = set()
    for one in work:
        at[(*one.replaces, *one.reads)[0].name].append(one)
        replaced.update(stored.name for stored in one.replaces)
    return [_shard(checkpoint.aliases, header, at, replaced) for header in checkpoint.shards]


def _shard(tied: Mapping[str, str], header: Header, at: Mapping[str, list[Work]], replaced: set[str]) -> Shard:
    shard = Shard(header.file.name)
    records: dict[str, object] = {}
    for key, text in header.metadata.items():
        if key != RECORDS and not (key in tied and text in replaced):
            shard.metadata[key] = text
    for stored in header.tensors:
        if stored.name not in replaced:
            shard.outputs.append(Output(stored.name, stored.dtype, stored.shape, stored))
        for one in at.get(stored.name, ()):
            shard.work.append(one)
            shard.outputs += one.outputs
            shard.metadata.update(one.aliases)
            if one.record is not None:
                records[one.name] = one.record
    if records:
        shard.metadata[RECORDS] = json.dumps(records, sort_keys=True)
    return shard
