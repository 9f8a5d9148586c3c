"""The output as a whole: one file or a folder, under its final name only when it is complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewriter.errors import ModelFileError, PlanError, RewriterError
from rewriter.serialization import check_writable, written_atomically
from rewriter.serialization._atomic import lock
from rewriter.streaming._checkpoint import Checkpoint, index_text
from rewriter.streaming._dcp import Pieces
from rewriter.streaming._layout import Shard
from rewriter.streaming._ranks import Ranks
from rewriter.streaming._write import Report, Writer, is_complete, together

MANIFEST = ".reparam.{}.json"


@dataclass(frozen=True)
class Written:
    """What was written.

    Arguments:
        shards: the names of the files with tensors.
        kept: those that an earlier run had written.
        nbytes: the size of all tensors.
    """

    shards: list[str]
    kept: list[str]
    nbytes: int


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_output(checkpoint: Checkpoint, shards: Sequence[Shard], output: Path, force: bool) -> None:
    """Refuse an output that cannot be written, before anything is evaluated.

    Raises:
        ModelFileError: the output exists, is the input, has the wrong name, or finds no room on the disk.
    """
    folder = Path(os.path.realpath(output)).parent
    if checkpoint.is_file:
        if output.suffix != ".safetensors":
            raise ModelFileError(f"{output}: one safetensors file gives one; name the output something.safetensors")
        check_writable(output, force)
    else:
        source = Path(os.path.realpath(checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent))
        target = Path(os.path.realpath(output))
        if output.suffix == ".safetensors" or (output.exists() and not output.is_dir()):
            raise ModelFileError(f"{output}: a folder of shards gives a folder; name one as the output")
        if source == target or source in target.parents or target in source.parents:
            raise ModelFileError(f"{output} is or contains the input, or lies in it; choose another folder")
        if not force and output.is_dir() and any(output.iterdir()):
            raise ModelFileError(f"{output} exists and is not empty; --force (or force=True) replaces it")
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ModelFileError(f"{output} cannot be written: {folder} is no folder that can be written to")
    wanted, free = sum(shard.nbytes for shard in shards), shutil.disk_usage(folder).free
    if wanted > free:
        raise ModelFileError(f"{output} takes {wanted} bytes, and the disk has {free} left")


def write_output(
    checkpoint: Checkpoint,
    shards: Sequence[Shard],
    output: Path,
    job: Mapping[str, Any],
    *,
    force: bool = False,
    resume: bool = False,
    workers: int | None = None,
    report: Report = lambda count, total: None,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> Written:
    """Write the shards, the index and the other files of a checkpoint.

    Arguments:
        checkpoint: the input.
        shards: the output's shards.
        output: a file for a file, a folder for anything else.
        job: everything that decides the bytes; a shard is kept only from the same job.
        force: replace what is there.
        resume: keep the complete shards of a run that ended early.
        workers: how many sites are evaluated at a time; the default is this process's share of the cores.
        report: hears of the bytes that were written.
        ranks: the processes that write together; each writes some of the shards.

    Raises:
        ModelFileError: the output cannot be written, or an input cannot be read.
        PlanError: chains refuse values; every value is named, and nothing is written under a final name.
    """
    check_output(checkpoint, shards, output, force)
    writer = Writer(shards, workers or max(1, cores() // ranks.here), report)
    names = [shard.file for shard in shards]
    if checkpoint.is_file:
        if ranks.rank == 0:
            with written_atomically(output, force=force) as temporary:
                writer.write(shards[0], temporary)
        ranks.shared(None)
        return Written(names, [], writer.nbytes)
    output = Path(os.path.realpath(output))
    partial = output.parent / f".{output.name}.partial"
    try:
        with _locked(partial) if ranks.rank == 0 else contextlib.nullcontext():
            digest = _digest(checkpoint, shards, job)
            earlier = _prepared(shards, partial, digest if resume else "") if ranks.rank == 0 else Earlier()
            # The bytes of some chains depend on the number of threads: all runs and processes take the first one's.
            kept, writer.threads = ranks.shared((earlier.kept, earlier.threads or writer.threads))[0]
            _write_shards(shards, partial, writer, digest, kept, ranks)
            if ranks.rank == 0:
                _write_rest(checkpoint, shards, partial)
                _publish(partial, output, force)
            ranks.shared(None)
    except OSError as problem:
        raise ModelFileError(f"{output} cannot be written: {problem.strerror or problem}") from problem
    return Written(names, sorted(kept), writer.nbytes)


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            lock(handle)
        except BlockingIOError:
            raise ModelFileError(f"another process writes {partial} now; wait for it") from None
        except OSError:  # as on some network disks
            pass
        yield
    finally:
        os.close(handle)


@dataclass
class Earlier:
    """What an earlier run of the same job left.

    Arguments:
        kept: for each shard that is complete, the checksums of its computed tensors.
        threads: with how many threads torch computed them.
    """

    kept: dict[str, Any] = field(default_factory=dict)
    threads: int = 0


def _prepared(shards: Sequence[Shard], partial: Path, digest: str) -> Earlier:
    """Return what an earlier run left that is complete and of this job, and remove the rest."""
    earlier = Earlier()
    manifests = list(partial.glob(MANIFEST.format("*")))
    for manifest in manifests if digest else ():
        _take(earlier, shards, manifest, digest)
    for file in partial.iterdir():
        if file.name not in earlier.kept and not (earlier.kept and file in manifests):
            file.unlink()
    return earlier


def _write_shards(
    shards: Sequence[Shard], partial: Path, writer: Writer, digest: str, kept: Mapping[str, Any], ranks: Ranks
) -> None:
    manifest = partial / MANIFEST.format(ranks.rank)
    done = dict(kept)
    refused: list[PlanError] = []
    ended: RewriterError | OSError | None = None
    try:
        for shard in shards[ranks.rank :: ranks.size]:
            if shard.file in kept:
                writer.report(shard.nbytes)
                continue
            temporary, final = partial / f".{shard.file}.tmp", partial / shard.file
            try:
                done[shard.file] = writer.write(shard, temporary)
            except PlanError as problem:
                refused.append(problem)  # the other shards may have more
                continue
            temporary.replace(final)
            temporary.write_text(json.dumps({"job": digest, "threads": writer.threads, "shards": done}, indent=2))
            temporary.replace(manifest)
    except (RewriterError, OSError) as problem:
        ended = problem
    problems = [problem for problem in ranks.shared(ended or (together(refused) if refused else None)) if problem]
    if problems:
        raise problems[0] if len(problems) == 1 or not isinstance(problems[0], PlanError) else together(problems)


def _take(earlier: Earlier, shards: Sequence[Shard], manifest: Path, digest: str) -> None:
    """Take the shards that a manifest says are complete, if they are of this job and the files are still so."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged manifest
        found = json.loads(manifest.read_text())
        sums, threads = (found["shards"] if found["job"] == digest else {}), int(found["threads"])
        for shard in shards:
            if shard.file in earlier.kept or shard.file not in sums:
                continue
            if is_complete(shard, manifest.parent / shard.file, sums[shard.file]):
                earlier.kept[shard.file], earlier.threads = sums[shard.file], threads


def _digest(checkpoint: Checkpoint, shards: Sequence[Shard], job: Mapping[str, Any]) -> str:
    pieces = (piece.file for one in checkpoint.tensors.values() if isinstance(one, Pieces) for piece in one.pieces)
    files = sorted({one.file for one in checkpoint.tensors.values()} | set(pieces))
    inputs = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    headers = [[shard.file, hashlib.sha256(shard.header()).hexdigest()] for shard in shards]
    return hashlib.sha256(json.dumps([inputs, headers, job], sort_keys=True, default=str).encode()).hexdigest()


def _write_rest(checkpoint: Checkpoint, shards: Sequence[Shard], partial: Path) -> None:
    for file in checkpoint.others:
        shutil.copyfile(file, partial / file.name)
    if checkpoint.index:
        places = {output.name: shard.file for shard in shards for output in shard.outputs}
        text = index_text(checkpoint.index_metadata, places, sum(shard.nbytes for shard in shards))
        (partial / checkpoint.index).write_text(text, encoding="utf-8")


def _publish(partial: Path, output: Path, force: bool) -> None:
    for manifest in partial.glob(MANIFEST.format("*")):
        manifest.unlink()
    if output.is_dir() and force and any(output.iterdir()):
        old = output.parent / f".{output.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        output.replace(old)
        partial.replace(output)
        shutil.rmtree(old)
    else:
        partial.replace(output)
