"""Checkpoints on disk: bake, apply and merge of synthetic ones, against `cp` and PEFT's merge_and_unload.

    python benchmarks/streaming.py --gib 0.5 2 8 --shards 20 --folder /tmp/streaming --write docs/scale.md

Each command runs in a process of its own, after a `cp` of the same files. Both end when the files are on the disk
(`sync`). The table has a command's seconds without imports, the ratio to that `cp`, and its peak memory above an
interpreter that has imported torch and rewriter. The start of the interpreter with these imports is a row of its own.
Nothing is left in the folder, which needs four times the size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._measure import Spread

MARKERS = ("<!-- streaming -->", "<!-- end of streaming -->")
CHAINS = {
    "scale": "{scale: {factor: 2.0}}",
    "lora": "{lora: {r: 16}}",
    "weight_norm": "weight_norm",
    "symmetric": "symmetric",
}
RUN = """
import json, os, sys, time
import torch, rewriter, rewriter.streaming as streaming
from rewriter.parametrizations._registry import names
names()
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before, start = peak(), time.perf_counter()
exec(sys.argv[1])
os.sync()
print(json.dumps([time.perf_counter() - start, peak() - before]))
"""
PEFT = """
import peft
from pathlib import Path
from safetensors.torch import load_file, save_file
folder, adapter, out = map(Path, sys.argv[2:5])
before, start = peak(), time.perf_counter()
shards = {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
model = torch.nn.Module()
for tensors in shards.values():
    for name, tensor in tensors.items():
        layer = torch.nn.Linear(*tensor.shape[::-1], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(tensor, requires_grad=False)
        block, _, rest = name.partition(".")
        if block not in model._modules:
            model.add_module(block, torch.nn.Module())
        getattr(model, block).add_module(rest.partition(".")[0], layer)
names = {file: list(tensors) for file, tensors in shards.items()}
del shards, tensors, tensor
state = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
out.mkdir()
for file, keys in names.items():
    save_file({key: state[key] for key in keys}, out / file, metadata={"format": "pt"})
"""


@dataclass
class Row:
    """What was measured of a command: one number for each repetition.

    Arguments:
        name: of the command.
        seconds: it took.
        copied: seconds of `cp` of the same files, directly before.
        peak: memory in MB above the interpreter's.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    copied: list[float] = field(default_factory=list)
    peak: float = 0.0

    def cells(self, size: str) -> str:
        """Return the row of the table: medians, and the quartiles of the ratio."""
        ratios = [one / other for one, other in zip(self.seconds, self.copied, strict=False)]
        spread = Spread.of(ratios) if ratios else None
        times = "" if spread is None else f"{spread.median:.1f} ({spread.low:.1f} to {spread.high:.1f})"
        peak = f"{self.peak:.0f}" if self.peak else ""
        return f"| {size} | {self.name} | {statistics.median(self.seconds):.1f} | {times} | {peak} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, nargs="+", default=[0.5])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--width", type=int, default=4096, help="each tensor is width × width")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/streaming"))
    parser.add_argument("--chains", nargs="*", choices=list(CHAINS), default=list(CHAINS))
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--write", type=Path, help="a page with the markers of the table")
    options = parser.parse_args(arguments)
    lines = ["| GiB | command | seconds | times `cp` | peak, MB |", "|---|---|---|---|---|"]
    start = time.perf_counter()
    _run("pass")
    lines.append(f"| | interpreter, torch, reparam | {time.perf_counter() - start:.1f} | | |")
    print("\n".join(lines), flush=True)
    for gib in options.gib:
        options.folder.mkdir(parents=True)
        try:
            for row in _measured(options, options.folder, gib):
                lines.append(row.cells(f"{gib:g}"))
                print(lines[-1], flush=True)
        finally:
            shutil.rmtree(options.folder)
    if options.write is not None:
        text = options.write.read_text(encoding="utf-8")
        block = f"{MARKERS[0]}\n\n" + "\n".join(lines) + f"\n\n{MARKERS[1]}"
        before, _, rest = text.partition(MARKERS[0])
        options.write.write_text(before + block + rest.partition(MARKERS[1])[2], encoding="utf-8")


def _measured(options: argparse.Namespace, folder: Path, gib: float) -> Iterator[Row]:
    plain, stored, out, adapter = (folder / name for name in ("plain", "stored", "out", "adapter"))
    names = make(plain, gib, options.shards, options.width, getattr(torch, options.dtype))
    make_adapter(adapter, names, options.width)
    for chain in options.chains:
        rules = f"reparam: 1\nrules:\n  - {{name: all, select: '**.weight', chain: [{CHAINS[chain]}]}}\n"
        apply = f"streaming.apply_checkpoint({str(plain)!r}, {rules!r}, sys.argv[2])"
        bake = f"streaming.bake_checkpoint({str(stored)!r}, {rules!r}, sys.argv[2])"
        yield _row(f"`apply`, {chain}", options.repeat, plain, stored, apply, stored)
        yield _row(f"`bake`, {chain}", options.repeat, stored, out, bake, out)
        shutil.rmtree(stored)
        shutil.rmtree(out)
    merge = f"streaming.merge_checkpoint({str(plain)!r}, [{str(adapter)!r}], sys.argv[2])"
    both = [("`merge` of a LoRA adapter", merge, (out,)), ("PEFT's `merge_and_unload`", PEFT, (plain, adapter, out))]
    if options.without_peft:
        both.pop()
    rows = [Row(name) for name, _, _ in both]
    for _ in range(options.repeat):  # side by side, so that a slow machine slows both
        for row, (_, code, paths) in zip(rows, both, strict=True):
            _sample(row, plain, out, code, *paths)
    yield from rows


def _row(name: str, repeat: int, source: Path, target: Path, code: str, *paths: Path) -> Row:
    row = Row(name)
    for _ in range(repeat):
        _sample(row, source, target, code, *paths)
    return row


def _sample(row: Row, source: Path, target: Path, code: str, *paths: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    row.copied.append(_copied(source, target))
    seconds, peak = _run(code, *paths)
    row.seconds.append(seconds)
    row.peak = max(row.peak, peak)


def make(folder: Path, gib: float, shards: int, width: int, dtype: torch.dtype) -> list[str]:
    """Write a checkpoint of random square weights and return their names."""
    folder.mkdir()
    count = max(1, round(gib * 2**30 / (width * width * dtype.itemsize)))
    shards = min(shards, count)  # each has a tensor
    names = [f"{number}.fc.weight" for number in range(count)]
    places = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(names)}
    generator = torch.Generator().manual_seed(0)
    for file in sorted(set(places.values())):
        tensors = {
            name: torch.randn(width, width, generator=generator).to(dtype) for name in names if places[name] == file
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    size = count * width * width * dtype.itemsize
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def make_adapter(folder: Path, names: Sequence[str], width: int, rank: int = 16) -> None:
    """Write a LoRA adapter for all weights, as PEFT saves one."""
    folder.mkdir()
    paths = [name.removesuffix(".weight") for name in names]
    A, B = torch.randn(rank, width) / width**0.5, torch.randn(width, rank) / width**0.5
    tensors = {f"base_model.model.{path}.lora_A.weight": A.clone() for path in paths}
    tensors |= {f"base_model.model.{path}.lora_B.weight": B.clone() for path in paths}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": paths}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _copied(source: Path, target: Path) -> float:
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def _run(code: str, *paths: Path) -> tuple[float, float]:
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    command = [sys.executable, "-c", RUN, code, *map(str, paths)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


if __name__ == "__main__":
    main()
