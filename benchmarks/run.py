"""Run the benchmarks and write their tables: ``python benchmarks/run.py``.

A full run takes some minutes on two cores and writes benchmarks/report.json and docs/benchmarks.md. With ``--quick``
or ``--only`` the tables are printed, and written where ``--out`` says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)

from benchmarks._report import Group, environment, to_markdown  # noqa: E402
from benchmarks._settings import Settings  # noqa: E402

BENCHMARKS = ("rnn", "lstm", "micro_batches", "batched", "inference", "maps", "rewriting")


def main() -> int:
    """Run what the command line asks for; return 1 if a row fails."""
    arguments = _parser().parse_args()
    chosen = [name for name in BENCHMARKS if name in (arguments.only or BENCHMARKS)]
    devices = [arguments.device] if arguments.device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    environments = {device: environment(device) for device in devices}
    groups = {device: [_run(name, Settings(arguments.quick, device)) for name in chosen] for device in devices}
    page = to_markdown(environments, groups)
    report = {
        "quick": arguments.quick,
        "environment": environments,
        "benchmarks": {device: [group.to_dict() for group in found] for device, found in groups.items()},
    }
    data = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    print(page)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        _write(arguments.out / "report.json", data)
        _write(arguments.out / "benchmarks.md", page)
    elif not arguments.quick and arguments.only is None and arguments.device is None:
        _write(HERE / "report.json", data)
        _write(HERE.parent / "docs" / "benchmarks.md", page)
    failed = [row.name for found in groups.values() for group in found for row in group.rows if row.passed is False]
    asked = sum(row.passed is not None for found in groups.values() for group in found for row in group.rows)
    print(f"{asked - len(failed)} of {asked} rows pass", *failed, sep="\n  fails: ", file=sys.stderr)
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="small work and few rounds; nothing is asked of the ratios"
    )
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="run this one; may be repeated")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only on this device; otherwise on all there are")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.json and benchmarks.md here")
    return parser


def _run(name: str, settings: Settings) -> Group:
    begin = time.perf_counter()
    group: Group = importlib.import_module(f"benchmarks.{name}").measure(settings)
    print(f"{name} on {settings.device}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return group


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
