"""The catalog in each export format, and the table of docs/serving.md.

``python -m benchmarks.serving`` writes the table into the page. It takes some minutes: AOTInductor compiles.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import rewriter
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
        for layer in self.layers.values():
            if isinstance(layer, nn.Conv1d):
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


def nodes_of(model: nn.Module) -> int:
    """Return the number of operations in the model's export."""
    program = torch.export.export(model.eval(), (INPUT,))
    return sum(node.op == "call_function" for node in program.graph.nodes)


def differences(model: nn.Module, format: Any, folder: Path) -> list[float]:
    """Return the difference between the model and its file for each output, relative to the largest entry.

    `export_model` has compared them in a new process, also at another batch size.
    """
    path = folder / {"torchscript": "m.ts", "pt2": "m.pt2", "onnx": "m.onnx", "aoti": "c.pt2"}[format]
    shapes = None if format == "torchscript" else "batch=0"
    written = export_model(model, path, format=format, example_inputs=INPUT, dynamic_shapes=shapes)
    assert written.difference is not None, written.unverified
    with torch.no_grad():
        outputs = zip(READERS[format](str(path))(INPUT), model(INPUT), strict=True)
        found = [((one - other).abs().max() / other.abs().max()).item() for one, other in outputs]
    assert written.difference < 1e-5
    return found


def families() -> dict[str, list[str]]:
    """Return the members by the file that has them."""
    found: dict[str, list[str]] = {}
    for name in catalog():
        found.setdefault(find(name).__module__.rpartition("._")[2].replace("_", " "), []).append(name)
    return found


def _table(formats: tuple[str, ...]) -> list[str]:
    head = ["family", "members", *formats, "operations: plain", "baked", "not baked"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    baked = rewriter.bake(rewritten(catalog()))
    with tempfile.TemporaryDirectory() as folder:
        found = {one: dict(zip(baked.layers, differences(baked, one, Path(folder)), strict=True)) for one in formats}
    for family, members in families().items():
        new = rewritten(members)
        plain = Stack([*new.get_submodule("layers")._modules])
        worst = [f"{max(found[one][name] for name in members):.0e}" for one in formats]
        counts = [str(nodes_of(one)) for one in (plain, rewriter.bake(new), new)]
        lines.append(f"| {family} | {len(members)} | {' | '.join([*worst, *counts])} |")
        print(lines[-1], file=sys.stderr)
    return lines


class Steps(nn.Module):
    """A recurrent layer that reads its weight at each of 20 time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(20):
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


def main(page: Path) -> None:
    """Write both tables into the page, between its markers."""
    warnings.simplefilter("ignore")
    text = page.read_text(encoding="utf-8")
    for name, lines in {
        "against torch": _against_torch(),
        "families": _table(("torchscript", "pt2", "onnx")),
    }.items():
        block = f"<!-- {name} -->\n\n" + "\n".join(lines) + f"\n\n<!-- end of {name} -->"
        text = re.sub(rf"<!-- {name} -->.*<!-- end of {name} -->", lambda _, block=block: block, text, flags=re.S)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parents[1] / "docs" / "serving.md")
