"""``reparam demo``: the whole job on real data in about a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli._app import command
from rewriter.cli._console import stderr
from rewriter.cli._options import Force
from rewriter.cli._outcome import Outcome

_PARTS = ("with the spec", "without it", "with torch's parametrize")


@command("reparam demo", "reparam demo --out demo --seconds 20 --force")
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", readable=False, help="The folder for the files.")] = Path(
        "reparam-demo"
    ),
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="About how long the demo takes.")] = 60,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Determines split, weights and batches.")] = 0,
    force: Force = False,
) -> Outcome:
    """Train a recurrent network on digits with an orthogonal kernel, bake it, export it, and compare."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr) as bars:
        tasks = {part: bars.add_task(f"training {part}", total=None) for part in _PARTS}

        def progress(part: str, done: int, total: int) -> None:
            bars.update(tasks[part], completed=done, total=total)

        from rewriter.demo import ARTEFACTS, run_demo, table_of

        report = run_demo(out, seconds=seconds, seed=seed, force=force, progress=progress)
    stderr.print(f"{out}: {', '.join(ARTEFACTS)}")
    stderr.print(f"next: reparam bake {out / 'rewritten.pt'} -o plain.pt")
    return Outcome({**report.to_dict(), "out": str(out), "artefacts": list(ARTEFACTS)}, table_of(report))
