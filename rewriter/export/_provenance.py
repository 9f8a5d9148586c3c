"""Where the weights of a file came from: rules and chains, a hash of them, and versions."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from rewriter.program import entries_of

KEY = "reparam.provenance"


def provenance(model: nn.Module | ExportedProgram) -> dict[str, Any]:
    """Return which chain computes which tensor of `model`, for the files that are exported from it.

    Call it before `bake`, and give the result to `export_model`.

    >>> import rewriter
    >>> rules = [{"name": "even", "select": "weight", "chain": ["symmetric"]}]
    >>> found = provenance(rewriter.rewrite(nn.Linear(2, 2), {"reparam": 1, "rules": rules}))
    >>> found["tensors"]["weight"], len(found["plan"])
    ({'rule': 'even', 'chain': ['symmetric'], 'options': ''}, 64)
    """
    tensors = {
        entry.name: {
            "rule": entry.site.spec.rule,
            "chain": list(entry.site.spec.chain),
            "options": entry.site.spec.options,
        }
        for entry in entries_of(model)
        if entry.site is not None
    }
    plan = hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()
    return {"tensors": tensors, "plan": plan, "versions": {"reparam": _version(), "torch": str(torch.__version__)}}


def read_provenance(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return what a file says of its weights; reading it runs no code of the file.

    Arguments:
        path: a TorchScript, pt2, AOTInductor, safetensors or ONNX file, or a folder with ``reparam.json``.
    """
    text = _text(Path(path))
    try:
        found = json.loads(text) if text else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _text(path: Path) -> str | None:
    if path.is_dir():
        noted = path / "reparam.json"
        return noted.read_text(encoding="utf-8") if noted.is_file() else None
    if path.suffix.lower() == ".onnx":
        model = importlib.import_module("onnx").load(path, load_external_data=False)
        return {entry.key: entry.value for entry in model.metadata_props}.get(KEY)
    if zipfile.is_zipfile(path):
        return _text_in_archive(path)
    if path.suffix.lower() == ".safetensors":
        with importlib.import_module("safetensors").safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(KEY)
    return None


def _text_in_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(f"/extra/{KEY}"):
                return archive.read(name).decode("utf-8", "replace")
            if name.endswith("wrapper_metadata.json"):
                noted = json.loads(archive.read(name))
                return noted.get(KEY) if isinstance(noted, dict) else None
    return None


def _version() -> str:
    try:
        return metadata.version("reparam")
    except metadata.PackageNotFoundError:
        return "checkout"
