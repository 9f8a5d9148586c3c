"""The data of a report: each tensor before and after, the rules, warnings and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewriter.cli._models import entries_of, state_of, values_of
from rewriter.sites import Site

if TYPE_CHECKING:
    from rewriter.planning import Entry

_POINTS = 32
"""How many singular values a plot has."""
_LARGEST = 1024
"""Singular values are computed up to this smaller side of a matrix."""


@torch.no_grad()
def report_data(after: Any, before: Any = None) -> dict[str, Any]:
    """Return what a report shows of a model, as JSON data.

    Arguments:
        after: the model, rewritten or plain.
        before: the model to compare with. Without it, a computed tensor is compared with its stored tensor, where that
            has the same shape.
    """
    values = values_of(after)
    old = values_of(before) if before is not None else _stored(after)
    reads = _reads(after)
    tensors = [_tensor(entry, values, old, reads) for entry in entries_of(after)]
    named = {name for tensor in tensors for name in tensor["names"]}
    missing = [name for name in old if name not in named] if before is not None else []
    return {
        "compared": "the model before" if before is not None else "stored tensors",
        "class": type(after).__name__,
        "tensors": tensors,
        "rules": _rules(tensors),
        "warnings": _warnings(tensors, missing),
        "totals": {**_totals(tensors, state_of(after), values), "uncounted": _uncounted(after, tensors)},
    }


def _tensor(
    entry: Entry, values: Mapping[str, Tensor], old: Mapping[str, Tensor], reads: Mapping[str, int]
) -> dict[str, Any]:
    info, spec = entry.infos[0], entry.site.spec if entry.site is not None else None
    value = _first(values, entry)
    before = _first(old, entry)
    after, moved = _numbers(value), _moved(before, value)
    return {
        "names": list(entry.names),
        "kind": info.kind,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "rule": spec.rule if spec is not None else None,
        "chain": list(spec.chain) if spec is not None else None,
        "cache": spec.cache if spec is not None else None,
        "reads": reads.get(entry.name),
        "after": after,
        "before": after if moved == 0 else _numbers(before),
        "moved": moved,
    }


def _first(values: Mapping[str, Tensor], entry: Entry) -> Tensor | None:
    return next((values[name] for name in entry.names if name in values), None)


def _stored(model: Any) -> dict[str, Tensor]:
    """Return the tensor that each chain starts from, where it stores one alone; plain tensors as they are."""
    found: dict[str, Tensor] = {}
    for entry in entries_of(model):
        # The site of a program is a record.
        originals = [entry.tensor] if entry.site is None else getattr(entry.site, "originals", [])
        if len(originals) == 1 and originals[0] is not None and tuple(originals[0].shape) == entry.infos[0].shape:
            found.update((name, originals[0].detach()) for name in entry.names)
    return found


def _numbers(tensor: Tensor | None) -> dict[str, Any] | None:
    """Return norm, share of zeros and singular values."""
    if tensor is None or tensor.is_meta:
        return None
    finite = bool(torch.isfinite(tensor).all()) if tensor.is_floating_point() or tensor.is_complex() else True
    zeros = 1 - int(tensor.count_nonzero()) / tensor.numel() if tensor.numel() else 0.0
    numbers: dict[str, Any] = {"finite": finite, "zeros": zeros, "norm": None, "singular": None}
    if finite and (tensor.is_floating_point() or tensor.is_complex()):
        wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
        numbers["norm"] = float(torch.linalg.vector_norm(wide))
        if tensor.ndim >= 2 and tensor.numel() and min(tensor.shape[0], tensor[0].numel()) <= _LARGEST:
            singular = torch.linalg.svdvals(wide.flatten(1))
            places = torch.linspace(0, len(singular) - 1, min(_POINTS, len(singular))).round().long()
            numbers["singular"] = [float(f"{value:.4g}") for value in singular[places].tolist()]
    return numbers


def _moved(before: Tensor | None, after: Tensor | None) -> float | None:
    if before is None or after is None or before.is_meta or after.is_meta or before.shape != after.shape:
        return None
    if before.dtype == after.dtype and torch.equal(before, after):
        return 0.0
    kind = torch.complex128 if before.is_complex() or after.is_complex() else torch.float64
    wide = before.to(kind)
    norm = float(torch.linalg.vector_norm(wide))
    far = float(torch.linalg.vector_norm(after.to(kind) - wide))
    return far / norm if norm else far


def _reads(model: Any) -> dict[str, int]:
    """Return how often a graph reads each computed tensor in a forward; module capture cannot say."""
    graph = getattr(model, "graph", None)
    if not isinstance(model, nn.Module) or graph is None:
        return {}
    sites = {node: model.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    return {site.spec.name: len(node.users) for node, site in sites.items() if isinstance(site, Site)}


def _uncounted(model: Any, tensors: list[dict[str, Any]]) -> str | None:
    """Return why the reads of computed tensors are unknown; None if they are known, or nothing is computed."""
    computed = [tensor for tensor in tensors if tensor["chain"] is not None]
    if not computed or any(tensor["reads"] is not None for tensor in computed):
        return None
    if not isinstance(model, nn.Module):
        return "not counted in an ExportedProgram, which evaluates each chain once per call"
    return "not known: the model kept its class (module capture), whose code decides in each forward what it reads"


def _rules(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rules: dict[str, list[dict[str, Any]]] = {}
    for tensor in tensors:
        if tensor["rule"] is not None:
            rules.setdefault(tensor["rule"], []).append(tensor)
    return [
        {
            "name": name,
            "chains": list(dict.fromkeys(" >> ".join(tensor["chain"]) for tensor in owned)),
            "tensors": len(owned),
            "moved": max((tensor["moved"] for tensor in owned if tensor["moved"] is not None), default=None),
        }
        for name, owned in rules.items()
    ]


def _warnings(tensors: list[dict[str, Any]], missing: list[str]) -> list[dict[str, Any]]:
    found = {
        "NaN or infinite entries": [t for t in tensors if t["after"] is not None and not t["after"]["finite"]],
        "all entries are zero": [
            t for t in tensors if t["after"] is not None and t["after"]["norm"] == 0 and t["chain"] is not None
        ],
        "computed, and no use in the graph": [t for t in tensors if t["reads"] == 0],
    }
    warnings = [{"text": text, "names": [t["names"][0] for t in owned]} for text, owned in found.items() if owned]
    return [*warnings, *([{"text": "only in the model before", "names": missing}] if missing else [])]


def _totals(
    tensors: list[dict[str, Any]], stored: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> dict[str, Any]:
    reads = [tensor["reads"] for tensor in tensors if tensor["reads"]]
    return {
        "tensors": len(tensors),
        "computed": sum(tensor["chain"] is not None for tensor in tensors),
        "reads": sum(reads) if reads else None,
        "saved": sum(reads) - len(reads) if reads else None,
        "stored_bytes": _bytes(stored),
        "plain_bytes": _bytes(values),
    }


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    distinct = {tensor.data_ptr() or id(tensor): tensor for tensor in tensors.values()}  # a tied tensor has two names
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
