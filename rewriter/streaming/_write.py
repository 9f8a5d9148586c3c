"""Writing one shard: copied bytes and computed tensors, each at its place, with a bound on what is in memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from rewriter.errors import ModelFileError, NumericError, PlanError
from rewriter.streaming._checksum import PAGE, Checksum
from rewriter.streaming._header import Stored
from rewriter.streaming._layout import Output, Shard, Work

PIECE = 64 << 20
"""How many bytes are copied at a time."""
AT_ONCE = 128 << 20
"""Sites run at the same time if together they hold at most the largest one and this."""

Report = Callable[[int, int], None]
"""Takes how many bytes of the output were written since the last call, and how many it has."""


@dataclass
class Memory:
    """Let work start while what runs holds less than a limit; work larger than the limit runs alone."""

    limit: int
    used: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    @contextlib.contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Wait until there is room for `nbytes`, and hold them while the body runs."""
        with self.changed:
            self.changed.wait_for(lambda: not self.used or self.used + nbytes <= self.limit)
            self.used += nbytes
        try:
            yield
        finally:
            with self.changed:
                self.used -= nbytes
                self.changed.notify_all()


class Writer:
    """Writes shards with several threads.

    Arguments:
        shards: all that will be written.
        workers: how many sites are evaluated at a time.
        report: hears of the bytes that were written.
        threads: how many threads torch has for one site; the default divides torch's number by the sites that run at
            the same time. The last bits of a QR depend on it.
    """

    def __init__(self, shards: Sequence[Shard], workers: int, report: Report, threads: int = 0) -> None:
        largest = max((work.nbytes for shard in shards for work in shard.work), default=0)
        self.memory = Memory(largest + AT_ONCE)
        self.workers, self._report = workers, report
        at_once = min(workers, self.memory.limit // max(largest, 1))
        self.threads = threads or max(1, torch.get_num_threads() // at_once)
        self.nbytes = sum(shard.nbytes for shard in shards)

    def report(self, count: int) -> None:
        """Say that more bytes are written."""
        self._report(count, self.nbytes)

    def write(self, shard: Shard, path: Path) -> dict[str, int]:
        """Write a shard to `path`, whatever is there.

        Returns:
            The checksum of each tensor that was computed.

        Raises:
            PlanError: chains refuse values; all of them are named.
            ModelFileError: a file cannot be read or written.
        """
        header = shard.header()
        with path.open("wb") as file:
            os.pwrite(file.fileno(), header, 0)
            os.truncate(file.fileno(), len(header) + shard.nbytes)
            return self._fill(shard, file.fileno(), shard.places())

    def _fill(self, shard: Shard, target: int, places: Mapping[str, int]) -> dict[str, int]:
        sums: dict[str, int] = {}
        before = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(self.threads,))
        try:
            tasks = [pool.submit(self._compute, work, target, places, sums) for work in shard.work]
            tasks += [pool.submit(self._copy, run, target, places[run[0].name]) for run in _runs(shard.outputs)]
            _finish(tasks)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)
        return sums

    def _compute(self, work: Work, target: int, places: Mapping[str, int], sums: dict[str, int]) -> None:
        with self.memory.holding(work.nbytes), torch.inference_mode(False), torch.no_grad():
            self._write_values(work, target, places, sums)
            _trim()

    def _write_values(self, work: Work, target: int, places: Mapping[str, int], sums: dict[str, int]) -> None:
        for output, blocks in zip(work.outputs, work.run(), strict=True):
            sums[output.name] = _put(target, output, blocks, places[output.name])
            self.report(output.nbytes)

    def _copy(self, outputs: Sequence[Output], target: int, place: int) -> None:
        first = outputs[0].source
        assert first is not None
        left, offset = sum(output.nbytes for output in outputs), first.start
        with first.file.open("rb", buffering=0) as source:
            while left:
                count = _copy_piece(source.fileno(), target, min(left, PIECE), offset, place)
                if not count:
                    raise ModelFileError(f"{first.file} became shorter while it was read")
                left, offset, place = left - count, offset + count, place + count
                self.report(count)


def _trim() -> None:
    """Give freed memory back to the system: glibc keeps some for each thread, as large as a site's tensors."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _finish(tasks: Sequence[Future[None]]) -> None:
    """Wait for all tasks. Refused values are collected, any other error ends the rest."""
    pending, refused = set(tasks), []
    while pending:
        done, pending = wait(pending, return_when=FIRST_EXCEPTION)
        for task in done:
            problem = task.exception()
            if isinstance(problem, PlanError):
                refused.append(problem)
            elif problem is not None:
                raise problem
    if refused:
        raise together(refused)


def together(refused: Sequence[PlanError]) -> PlanError:
    """Return one error for several refused values."""
    found = [diagnostic for problem in refused for diagnostic in problem.diagnostics]
    return PlanError("\n".join(map(str, refused)), found)


def _runs(outputs: Sequence[Output]) -> list[list[Output]]:
    """Return the outputs that are copied; those that follow each other in both files are one run."""
    runs: list[list[Output]] = []
    before: Output | None = None
    for output in outputs:
        if output.source is not None:
            if before is not None and before.source is not None and _follows(output.source, before.source):
                runs[-1].append(output)
            else:
                runs.append([output])
        before = output
    return runs


def _follows(stored: Stored, before: Stored) -> bool:
    return stored.file == before.file and stored.start == before.start + before.nbytes


def _copy_piece(source: int, target: int, count: int, offset: int, place: int) -> int:
    try:
        return os.copy_file_range(source, target, count, offset, place)
    except (AttributeError, OSError):  # another system, or files on two file systems
        return os.pwrite(target, os.pread(source, min(count, PIECE >> 4), offset), place)


def _put(target: int, output: Output, blocks: Iterable[Tensor], place: int) -> int:
    """Write the blocks of rows of a tensor one after the other, and return the checksum of all."""
    total, left = Checksum(), output.nbytes
    for block in blocks:
        left -= block.nbytes
        if left < 0 or (block.dtype, block.shape[1:]) != (output.dtype, output.shape[1:]):
            raise _other_form(output, block)
        content = block.detach().contiguous().reshape(-1)
        rest = content.view(torch.uint8).numpy().data if content.numel() else memoryview(b"")
        total.add(rest)
        while len(rest):
            count = os.pwrite(target, rest, place)
            rest, place = rest[count:], place + count
    if left:
        raise _other_form(output, block)
    return total.value


def _other_form(output: Output, value: Tensor) -> NumericError:
    return NumericError(
        f"{output.name} is {(value.dtype, tuple(value.shape))}, and was planned as {(output.dtype, output.shape)}: the "
        "form of what the chain stores depends on the values of the tensor. Rewrite the model in memory"
    )


def is_complete(shard: Shard, path: Path, sums: Mapping[str, int]) -> bool:
    """Whether a file is the shard to the last byte: its header, copies, and computed tensors by checksum."""
    header = shard.header()
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != len(header) + shard.nbytes or file.read(len(header)) != header:
            return False
        for output in shard.outputs:
            found = _checksum(file, output.nbytes)
            if output.source is None:
                wanted = sums.get(output.name)
            else:
                with output.source.file.open("rb") as source:
                    source.seek(output.source.start)
                    wanted = _checksum(source, output.nbytes)
            if found != wanted:
                return False
    return True


def _checksum(file: BinaryIO, count: int) -> int:
    total = Checksum()
    while count and (piece := file.read(min(count, PAGE << 10))):
        total.add(piece)
        count -= len(piece)
    return total.value
