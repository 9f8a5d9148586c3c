"""The catalog in each export format, and the tables of docs/serving.md.

``python -m benchmarks.serving`` writes the tables into the page; ``python -m benchmarks.serving costs`` writes one of
them. It takes some minutes, and needs a C++ compiler.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import rewriter
from benchmarks._measure import interleaved
from rewriter.errors import CaptureError
from rewriter.export import export_model
from rewriter.export._read_back import READERS
from rewriter.parametrizations._registry import find, names

STEPS: dict[str, dict[str, Any]] = {
    "adalora": {"r": 2},
    "affine": {"inputs": ["layers.identity.weight"]},
    "almost_orthogonal": {"radius": 0.3},
    "block_diagonal": {"blocks": 2},
    "block_sparse": {"amount": 2, "block_shape": [2, 2]},
    "c3a": {"block_size": 2},
    "cast": {"dtype": "float32"},
    "conv_spectral_norm": {"input_size": [5]},
    "delora": {"r": 2},
    "dora": {"r": 2},
    "fake_quantize": {"bits": 4},
    "fixed_rank": {"rank": 2},
    "fourierft": {"n_frequency": 3},
    "global_l1": {"amount": 3},
    "global_random": {"amount": 3},
    "gralora": {"r": 2},
    "hira": {"r": 2},
    "hra": {"r": 2},
    "interval": {"low": -1.0, "high": 2.0},
    "kronecker": {"factor_shape": [2, 2], "rank": 2},
    "l1_unstructured": {"amount": 0.5},
    "ln_structured": {"amount": 1, "n": 2, "dim": 0},
    "loha": {"r": 2},
    "lokr": {"r": 1},
    "lora": {"r": 2},
    "low_rank": {"rank": 2},
    "mask": {"mask": torch.ones(6, 6).tril()},
    "miss": {"r": 2},
    "n_m": {"n": 1, "m": 2},
    "oft": {"oft_block_size": 2},
    "random_structured": {"amount": 1, "dim": 0},
    "random_unstructured": {"amount": 3},
    "road": {"group_size": 2},
    "scale": {"factor": 2.0},
    "shift": {"offset": 1.0},
    "shira": {"r": 1},
    "trainable_tokens": {"token_indices": [1]},
    "vera": {"r": 2},
    "weight_dropout": {"p": 0.5},
}
"""Arguments of the members that need some."""


def catalog() -> list[str]:
    """Return the names of the package's own classes; a doctest of the registry registers one more."""
    homes = {name: find(name).__module__ for name in names()}
    return [
        name
        for name, home in homes.items()
        if home.startswith("rewriter.parametrizations.") and not home.endswith("._registry")
    ]


class Stack(nn.Module):
    """One layer for each member of the catalog, with an output of its own."""

    def __init__(self, members: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: nn.Conv1d(6, 6, 3) if name == "conv_spectral_norm" else _linear(name) for name in members}
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for name, layer in self.layers.items():
            if name == "conv_spectral_norm":  # TorchScript answers isinstance by what it has compiled before
                found.append(layer(x.unsqueeze(-1).expand(-1, -1, 5)))
            else:
                found.append(torch.tanh(layer(x)))
        return found


def _linear(name: str) -> nn.Linear:
    return nn.Linear(6, 3 if name == "grassmann" else 6)  # all of a space has no subspace to choose


def rewritten(members: list[str]) -> nn.Module:
    """Return a stack in which each layer's weight is computed by one member."""
    torch.manual_seed(0)
    every = [*members, "identity"] if "affine" in members and "identity" not in members else members
    rules = []
    for name in every:
        step = {name: STEPS[name]} if name in STEPS else name
        drawn = {"init": "sample"} if name in ("gl_plus", "hurwitz_stable", "sl") else {}
        rules.append({"name": name, "select": f"layers.{name}.weight", "chain": [step], **drawn})
    return rewriter.rewrite(Stack(every).eval(), {"reparam": 1, "rules": rules})


INPUT = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
FORMATS = {"torchscript": "m.ts", "pt2": "m.pt2", "onnx": "m.onnx", "aoti": "c.pt2"}


def nodes_of(model: nn.Module) -> int:
    """Return the number of operations in the model's export."""
    program = torch.export.export(model.eval(), (INPUT,))
    return sum(node.op == "call_function" for node in program.graph.nodes)


def differences(model: nn.Module, format: Any, folder: Path) -> list[float]:
    """Return the difference between the model and its file for each output, relative to the largest entry.

    `export_model` has compared them in a new process, also at another batch size.
    """
    path = folder / FORMATS[format]
    shapes = None if format == "torchscript" else "batch=0"
    written = export_model(model, path, format=format, example_inputs=INPUT, dynamic_shapes=shapes)
    assert written.difference is not None, written.unverified
    assert written.difference < 1e-5
    return _distances(model, format, path)


def families() -> dict[str, list[str]]:
    """Return the members by the file that has them."""
    found: dict[str, list[str]] = {}
    for name in catalog():
        found.setdefault(find(name).__module__.rpartition("._")[2].replace("_", " "), []).append(name)
    return found


def _table() -> list[str]:
    head = ["family", "members", *FORMATS, "operations: plain", "baked", "not baked"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    baked = rewriter.bake(rewritten(catalog()))
    with tempfile.TemporaryDirectory() as folder:
        found = {one: dict(zip(baked.layers, differences(baked, one, Path(folder)), strict=True)) for one in FORMATS}
    for family, members in families().items():
        new = rewritten(members)
        worst = [f"{max(found[one][name] for name in members):.0e}" for one in FORMATS]
        counts = [str(nodes_of(one)) for one in (plain_of(new), rewriter.bake(new), new)]
        lines.append(f"| {family} | {len(members)} | {' | '.join([*worst, *counts])} |")
    return lines


def plain_of(model: nn.Module) -> Stack:
    """Return a stack like `model` that nobody rewrote."""
    return Stack([*model.get_submodule("layers")._modules]).eval()


def _costs() -> list[str]:
    """Return the sizes and the times of pt2 files by family, and what ONNX says of a model that is not baked."""
    head = ["family", "KB: plain", "baked", "not baked", "time: baked", "not baked", "ONNX, not baked"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for family, members in families().items():
        new = rewritten(members)
        models = {"plain": plain_of(new), "baked": rewriter.bake(new), "not baked": new}
        with tempfile.TemporaryDirectory() as folder:
            sizes, ratios = _sizes_and_times(models, "pt2", Path(folder))
            onnx = _onnx_of(new, Path(folder))
        lines.append(f"| {family} | {' | '.join([*sizes, *ratios, onnx])} |")
        print(lines[-1], file=sys.stderr)
    return lines


def _sizes_and_times(models: dict[str, nn.Module], format: Any, folder: Path) -> tuple[list[str], list[str]]:
    """Return the sizes of the models' files in kB, and the shortest times of a call, against the first one's."""
    runs, sizes = {}, []
    for name, model in models.items():
        path = folder / f"{name.replace(' ', '_')}{FORMATS[format][1:]}"
        export_model(model, path, format=format, example_inputs=INPUT, verify=False)
        sizes.append(f"{path.stat().st_size / 1000:.0f}")
        runs[name] = READERS[format](str(path))
    first, *others = models
    shortest = {name: math.inf for name in runs}
    for _ in range(15):
        for name, run in runs.items():
            shortest[name] = min(shortest[name], _seconds(run))
    return sizes, [f"{shortest[name] / shortest[first]:.2f}" for name in others]


@torch.no_grad()
def _seconds(run: Callable[[Tensor], Any]) -> float:
    """Return the processor time of 20 calls, which other programs hardly change."""
    begin = time.process_time()
    for _ in range(20):
        run(INPUT)
    return time.process_time() - begin


def _onnx_of(model: nn.Module, folder: Path) -> str:
    path = folder / "not_baked.onnx"
    try:
        export_model(model, path, example_inputs=INPUT, verify=False)
    except CaptureError as problem:
        operator = re.search(r"aten[.:]+(\w+)", str(problem))
        return f"no `{operator[1]}`" if operator else "refused"
    return f"{max(_distances(model, 'onnx', path)):.0e}"


def _distances(model: nn.Module, format: str, path: Path) -> list[float]:
    """Return the difference of each output of a file, relative to its largest entry."""
    with torch.no_grad():
        outputs = zip(READERS[format](str(path))(INPUT), model(INPUT), strict=True)
        return [((one - other).abs().max() / other.abs().max()).item() for one, other in outputs]


def _formats() -> list[str]:
    """Return the sizes and the times of the files of the whole catalog, by format."""
    lines = ["| format | KB: plain | baked | time: baked |", "|---|---|---|---|"]
    new = rewritten(catalog())
    models = {"plain": plain_of(new), "baked": rewriter.bake(new)}
    for format in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            sizes, ratios = _sizes_and_times(models, format, Path(folder))
        lines.append(f"| {format} | {' | '.join([*sizes, *ratios])} |")
        print(lines[-1], file=sys.stderr)
    return lines


def _training() -> list[str]:
    """Return the time of a training step of an exported model against the rewritten model that was exported."""
    lines = ["| orthogonal map | training step of the file |", "|---|---|"]
    for chosen in ("matrix_exp", "cayley", "householder"):
        torch.manual_seed(0)
        rule = {"name": "o", "select": "cell.weight", "chain": [{"orthogonal": {"map": chosen}}]}
        # The pass `rows` makes a loop faster than the plain model, and a file has no passes.
        model = rewriter.rewrite(Steps(128, 100), {"reparam": 1, "rules": [rule]}, without=["rows"])
        x = torch.randn(32, 128)
        exported = torch.export.export(model, (x,)).module()
        runs = {name: functools.partial(_step, one, x) for name, one in (("file", exported), ("eager", model))}
        lines.append(f"| {chosen} | {interleaved(runs, 41, longest=15.0).ratio('file', 'eager').median:.2f} |")
        print(lines[-1], file=sys.stderr)
    return lines


def _step(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


class Steps(nn.Module):
    """A recurrent layer that reads its weight at each time step."""

    def __init__(self, size: int = 6, count: int = 20) -> None:
        super().__init__()
        self.cell, self.count = nn.Linear(size, size), count

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.count):
            x = torch.tanh(self.cell(x))
        return x


def _against_torch() -> list[str]:
    torch.manual_seed(0)
    plain = Steps().eval()
    theirs = Steps().eval()
    theirs.load_state_dict(plain.state_dict())
    nn.utils.parametrizations.orthogonal(theirs.cell)
    rule = {"name": "o", "select": "cell.weight", "chain": ["orthogonal"]}
    ours = rewriter.rewrite(plain, {"reparam": 1, "rules": [rule]})
    with parametrize.cached():
        cached = torch.export.export(theirs, (INPUT,))
    counts = {
        "plain model": nodes_of(plain),
        "torch's parametrization": nodes_of(theirs),
        "torch's parametrization, exported in `cached()`": sum(one.op == "call_function" for one in cached.graph.nodes),
        "rewritten, not baked": nodes_of(ours),
        "baked": nodes_of(rewriter.bake(ours)),
    }
    return ["| export of 20 time steps | operations |", "|---|---|", *(f"| {k} | {v} |" for k, v in counts.items())]


def main(page: Path, chosen: list[str]) -> None:
    """Write the tables, or those that are named, into the page between its markers."""
    warnings.simplefilter("ignore")
    made = {
        "against torch": _against_torch,
        "training": _training,
        "families": _table,
        "costs": _costs,
        "formats": _formats,
    }
    for name in chosen or made:
        block = f"<!-- {name} -->\n\n" + "\n".join(made[name]()) + f"\n\n<!-- end of {name} -->"
        text = page.read_text(encoding="utf-8")
        text = re.sub(rf"<!-- {name} -->.*<!-- end of {name} -->", lambda _, block=block: block, text, flags=re.S)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parents[1] / "docs" / "serving.md", sys.argv[1:])
