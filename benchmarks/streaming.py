"""Checkpoints on disk: bake, apply and merge of a synthetic one, against `cp` and PEFT's merge_and_unload.

    python benchmarks/streaming.py --gib 2 --shards 8 --folder /tmp/streaming

Each command runs in a process of its own. The table has its seconds without imports, and its peak memory above an
interpreter that has imported torch and rewriter. Nothing is left in the folder, which needs five times the size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

CHAINS = {
    "scale": "{scale: {factor: 2.0}}",
    "lora": "{lora: {r: 16}}",
    "weight_norm": "weight_norm",
    "symmetric": "symmetric",
}
RUN = """
import json, sys, time
import torch, rewriter, rewriter.streaming as streaming
from rewriter.parametrizations._registry import names
names()
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before, start = peak(), time.perf_counter()
exec(sys.argv[1])
print(json.dumps([time.perf_counter() - start, peak() - before]))
"""
PEFT = """
import os, peft, json
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


def main(arguments: Sequence[str] | None = None) -> list[dict[str, object]]:
    """Measure, print the table and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--width", type=int, default=4096, help="each tensor is width × width")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/streaming"))
    parser.add_argument("--chains", nargs="*", choices=list(CHAINS), default=list(CHAINS))
    parser.add_argument("--without-peft", action="store_true")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    folder.mkdir(parents=True)
    try:
        return _measured(options, folder)
    finally:
        shutil.rmtree(folder)


def _measured(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    names = make(folder / "plain", options.gib, options.shards, options.width, getattr(torch, options.dtype))
    make_adapter(folder / "adapter", names, options.width)
    rows: list[dict[str, object]] = []

    def row(name: str, seconds: float, peak: float) -> None:
        rows.append({"command": name, "seconds": round(seconds, 2), "peak MB": round(peak)})
        print(f"| {name:<28} | {seconds:8.2f} s | {peak:6.0f} MB |", flush=True)

    row("cp", *_copied(folder / "plain", folder / "out"))
    for chain in options.chains:
        rules = f"reparam: 1\nrules:\n  - {{name: all, select: '**.weight', chain: [{CHAINS[chain]}]}}\n"
        apply = f"streaming.apply_checkpoint({str(folder / 'plain')!r}, {rules!r}, sys.argv[2])"
        bake = f"streaming.bake_checkpoint({str(folder / 'stored')!r}, {rules!r}, sys.argv[2])"
        row(f"apply {chain}", *_run(apply, folder / "stored"))
        row(f"cp, with {chain}", *_copied(folder / "stored", folder / "out"))
        row(f"bake {chain}", *_run(bake, folder / "out"))
        shutil.rmtree(folder / "stored")
        shutil.rmtree(folder / "out")
    merge = f"streaming.merge_checkpoint({str(folder / 'plain')!r}, [{str(folder / 'adapter')!r}], sys.argv[2])"
    row("merge", *_run(merge, folder / "out"))
    if not options.without_peft:
        shutil.rmtree(folder / "out")
        row("PEFT merge_and_unload", *_run(PEFT, folder / "plain", folder / "adapter", folder / "out"))
    return rows


def make(folder: Path, gib: float, shards: int, width: int, dtype: torch.dtype) -> list[str]:
    """Write a checkpoint of random square weights and return their names."""
    folder.mkdir()
    count = max(shards, round(gib * 2**30 / (width * width * dtype.itemsize)))
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


def _copied(source: Path, target: Path) -> tuple[float, float]:
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds, 0.0


def _run(code: str, *paths: Path) -> tuple[float, float]:
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    command = [sys.executable, "-c", RUN, code, *map(str, paths)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


if __name__ == "__main__":
    main()
