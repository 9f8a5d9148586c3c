"""Run the benchmarks and write their tables: ``python benchmarks/run.py``.

A full run is done with one thread for each operator, then with as many as there are cores, and on a GPU if the machine
has one. No timing takes much longer than ten seconds, if seven rounds do not. It writes benchmarks/report.json,
docs/benchmarks.md and the table of README.md. With ``--quick``, ``--only``, ``--device`` or ``--threads`` the tables
are printed, and written where ``--out`` says. ``--readme`` measures nothing: it writes the table of README.md from
benchmarks/report.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
sys.path[0] = str(HERE.parent)

from benchmarks._measure import keep_memory  # noqa: E402
from benchmarks._report import Group, environment, to_markdown  # noqa: E402
from benchmarks._settings import Settings  # noqa: E402
from benchmarks._summary import summary, write_readme  # noqa: E402

BENCHMARKS = (
    "rnn",
    "lstm",
    "micro_batches",
    "batched",
    "inference",
    "maps",
    "rewriting",
    "ordinary",
    "compiled",
    "passes",
)


def main() -> int:
    """Run the benchmarks that the command line names; return 1 if a row misses its target."""
    arguments = _parser().parse_args()
    if arguments.readme:
        write_readme(README, json.loads((HERE / "report.json").read_text(encoding="utf-8")))
        return 0
    keep_memory()
    chosen = [name for name in BENCHMARKS if name in (arguments.only or BENCHMARKS)]
    environments: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[Group]] = {}
    for settings in _all_settings(arguments):
        torch.set_num_threads(settings.threads)
        environments[settings.label] = environment(settings.device)
        groups[settings.label] = [_run(name, settings) for name in chosen]
    measured = {label: [group.to_dict() for group in found] for label, found in groups.items()}
    page = to_markdown(environments, groups, summary(next(iter(measured.values()), [])))
    report = {"quick": arguments.quick, "environment": environments, "benchmarks": measured}
    data = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    print(page)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        _write(arguments.out / "report.json", data)
        _write(arguments.out / "benchmarks.md", page)
    elif not (arguments.quick or arguments.only or arguments.device or arguments.threads):
        _write(HERE / "report.json", data)
        _write(HERE.parent / "docs" / "benchmarks.md", page)
        write_readme(README, report)
    rows = [(label, row) for label, found in groups.items() for group in found for row in group.rows]
    counts = Counter(row.verdict for _, row in rows)
    notes = [
        f"{row.verdict}: {label}, {row.name}, {row.what} against {row.against}"
        for label, row in rows
        if row.verdict in ("even", "fails")
    ]
    verdicts = f"{counts['holds']} rows hold, {counts['even']} are even, {counts['fails']} fail"
    print(verdicts, *notes, sep="\n  ", file=sys.stderr)
    return int(counts["fails"] > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small work and few rounds, without targets")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="run this one; may be repeated")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only on this device; by default on all devices")
    parser.add_argument(
        "--threads", type=int, action="append", metavar="N", help="number of threads on the CPU; may be repeated"
    )
    parser.add_argument("--readme", action="store_true", help="only write README's table from benchmarks/report.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.json and benchmarks.md here")
    return parser


def _all_settings(arguments: argparse.Namespace) -> list[Settings]:
    devices = [arguments.device] if arguments.device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    cores = os.cpu_count() or 1
    threads = arguments.threads or sorted({1, cores})
    found = [Settings(arguments.quick, "cpu", count) for count in threads if "cpu" in devices]
    return found + [Settings(arguments.quick, "cuda", cores) for device in devices if device == "cuda"]


def _run(name: str, settings: Settings) -> Group:
    begin = time.perf_counter()
    group: Group = importlib.import_module(f"benchmarks.{name}").measure(settings)
    print(f"{name} on {settings.label}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return group


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
