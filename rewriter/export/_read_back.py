"""Run an exported file in a process of its own; for most formats without importing rewriter.

``python _read_back.py FORMAT FILE CALLS OUTPUTS``: CALLS and OUTPUTS are files of torch.save.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree


def _run_onnx(path: str) -> Callable[..., Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        names = [one.name for one in session.get_inputs()]
        found = session.run(
            None, {name: value.detach().cpu().numpy() for name, value in zip(names, given, strict=True)}
        )
        return [torch.from_numpy(value) for value in found]

    return run


def _run_module(path: str) -> Any:
    from rewriter.serialization import load_model

    return load_model(path, trust=True).eval()  # type: ignore[union-attr]


def _run_hf(path: str) -> Any:
    import json
    from pathlib import Path

    import transformers

    (name,) = json.loads((Path(path) / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(path).eval()


READERS: dict[str, Callable[[str], Any]] = {
    "module": _run_module,
    "torchscript": torch.jit.load,
    "pt2": lambda path: torch.export.load(path).module(),
    "aoti": lambda path: torch._inductor.aoti_load_package(path),
    "onnx": _run_onnx,
    "hf": _run_hf,
}


def main(format: str, path: str, calls: str, outputs: str) -> None:
    """Write the outputs of the file for each of the calls."""
    warnings.simplefilter("ignore")
    run = READERS[format](path)
    found = []
    with torch.no_grad():
        for args, kwargs in torch.load(calls, weights_only=False):
            leaves = pytree.tree_leaves(plain(run(*args, **kwargs)))
            found.append([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    torch.save(found, outputs)


def plain(value: Any) -> Any:
    """Return `value` with a dict for each dataclass and each class of mapping; entries that are None are left out.

    >>> from collections import OrderedDict
    >>> plain(OrderedDict(a=1, b=None)), plain((1, [2]))
    ({'a': 1}, (1, [2]))
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Mapping):
        value = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items() if one is not None}
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    return value


if __name__ == "__main__":
    main(*sys.argv[1:])
