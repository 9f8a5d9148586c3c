"""Commands on checkpoints: folders, shard indexes and safetensors files, streamed and never whole in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rewriter.cli import _inputs
from rewriter.cli._console import stderr, step
from rewriter.cli._options import ModelOptions, SpecOptions, StreamOptions
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import counted
from rewriter.errors import RewriterError

if TYPE_CHECKING:
    from rewriter.language import Spec
    from rewriter.planning import Entry
    from rewriter.streaming import Streamed

    Verb = Callable[..., Streamed]


def refuse_options(given: Mapping[str, Any]) -> None:
    """Refuse options that have no meaning for a checkpoint."""
    for option, value in given.items():
        if value:
            raise RewriterError(f"{option} works on a model, and a checkpoint has only tensors; leave it out")


def run(
    verb: Verb,
    path: Path,
    output: Path,
    spec: Path,
    spec_options: SpecOptions,
    model_options: ModelOptions,
    stream: StreamOptions,
    force: bool,
) -> Outcome:
    """Bake or rewrite a checkpoint."""
    read = spec_options.read(spec)
    if output.exists() and spec.exists() and output.samefile(spec):
        raise RewriterError(f"{output} is the spec itself; choose another name for the output")
    with factory(path, model_options) as model, written(output, stream, force) as how:
        done = verb(path, read, output, model=model, **how)
    files = done.written
    verb_done = "baked" if verb.__name__.startswith("bake") else "rewritten"
    count, shards = counted(len(done.names), "tensor"), counted(len(files.shards), "shard")
    kept = f", {len(files.kept)} of them kept" if files.kept else ""
    stderr.print(f"wrote {output}: {count} {verb_done}, {shards}{kept}")
    document = {verb_done: done.names, "left": [], "output": str(output), "format": "safetensors"}
    sizes = {"shards": files.shards, "kept": files.kept, "bytes": files.nbytes}
    return Outcome({**done.plan.to_dict(), **document, **sizes})


@contextlib.contextmanager
def factory(path: Path, options: ModelOptions) -> Iterator[Any]:
    """Give the body the function that makes the model, if one is named."""
    refuse_options({"--key": options.key, "--allow": options.allow, "--trust": options.trust})
    if options.model is None:
        yield None
        return
    with _inputs.working_folder_importable(True):
        from rewriter.cli._script import script_of
        from rewriter.serialization._load import factory_of

        with script_of(path, options.model) as (named, _):
            yield factory_of(named)


@contextlib.contextmanager
def written(output: Path, stream: StreamOptions, force: bool) -> Iterator[dict[str, Any]]:
    """Give the body how to write. Of the processes of torchrun, only the first reports."""
    from rewriter.streaming import ranks_of_torchrun

    ranks = ranks_of_torchrun()
    stderr.quiet = stderr.quiet or ranks.rank > 0
    with progress(output) as report:
        yield {"force": force, "resume": stream.resume, "workers": stream.workers, "report": report, "ranks": ranks}
    if ranks.rank > 0:
        raise typer.Exit


@contextlib.contextmanager
def progress(output: Path) -> Iterator[Callable[[int, int], None]]:
    """Show bytes, speed and the time left on a terminal."""
    # torch asks when it first needs much memory. Most of the time of a fast chain goes into touching small pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from rich import progress as rich

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn())
    times = (rich.TransferSpeedColumn(), rich.TimeRemainingColumn())
    hidden = not stderr.is_terminal
    with rich.Progress(*columns, *times, console=stderr, transient=True, disable=hidden) as shown:
        task = shown.add_task(f"writing {output}", total=None)
        yield lambda count, total: shown.update(task, advance=count, total=total)


def plan(path: Path, spec: Path, spec_options: SpecOptions, model_options: ModelOptions) -> Outcome:
    """Plan a checkpoint from its headers."""
    from rewriter.streaming import plan_checkpoint

    read = spec_options.read(spec)
    with step("planning"), factory(path, model_options) as model:
        made = plan_checkpoint(path, read, model).plan
    return Outcome(made.to_dict(), str(made))


def entries(path: Path, model_options: ModelOptions, spec: Spec | None = None) -> list[Entry]:
    """Return the plain tensors of a checkpoint from its headers; `spec` has the chains that they do not record."""
    from rewriter.language import load_spec
    from rewriter.streaming import plain_entries

    with factory(path, model_options) as model:
        return plain_entries(path, spec or load_spec({"reparam": 1, "rules": []}), model)


def tensors_of(path: Path) -> list[dict[str, Any]]:
    """Describe the tensors of a checkpoint as its headers have them."""
    from rewriter.streaming import described_tensors, open_checkpoint

    return described_tensors(open_checkpoint(path))
