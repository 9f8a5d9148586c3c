"""The LoRA and DoRA chains of a rewritten model as an adapter that PEFT loads onto the plain model."""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rewriter._given import check_model
from rewriter.errors import ModelFileError, RewriterError
from rewriter.parametrizations._adapters import Dora, Lora
from rewriter.planning import Entry, survey
from rewriter.serialization import check_writable, written_atomically
from rewriter.serialization._peft_folder import PREFIX
from rewriter.sites import plain_class

_SAME_BASE = (True, "gaussian", "orthogonal")


@dataclass(frozen=True)
class _Layer:
    """One layer as PEFT has it: where it is, its step, and its tensors by PEFT's names."""

    path: str
    step: Lora
    tensors: Mapping[str, Tensor]
    transposed: bool


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, base: str | None = None, force: bool = False
) -> None:
    """Write the ``lora`` and ``dora`` chains of `model` to a folder, as PEFT's ``save_pretrained`` writes an adapter.

    PEFT loads it onto the model as it was before it was rewritten. Other trained tensors are not written.

    Arguments:
        model: each of its computed tensors is computed by ``lora`` or ``dora`` alone.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the name of the base model, which PEFT reads from the configuration.
        force: overwrite the two files.

    Raises:
        RewriterError: a chain is none that PEFT has.
        ModelFileError: the folder cannot be written.
    """
    check_model(model, "save_adapter")
    layers = [_layer(entry) for entry in survey(model) if entry.site is not None]
    if not layers:
        raise RewriterError("save_adapter found no computed tensor; rewrite the model with `lora` or `dora` first")
    settings = _settings(layers, base)
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ModelFileError(f"{target} cannot be written: {problem.strerror}") from problem
    names = ("adapter_model.safetensors", "adapter_config.json")
    for name in names:
        check_writable(target / name, force)
    tensors = {key: tensor for layer in layers for key, tensor in layer.tensors.items()}
    save_file: Any = importlib.import_module("safetensors.torch").save_file
    with written_atomically(target / names[0], force=force) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    with written_atomically(target / names[1], force=force) as file:
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _layer(entry: Entry) -> _Layer:
    site, name = entry.site, entry.name
    assert site is not None
    step: Any = site.steps[0]
    shown = " >> ".join(site.spec.chain)
    if len(site.steps) != 1 or type(step) not in (Lora, Dora) or not site.spec.simple:
        raise RewriterError(f"{name}: {shown} is no LoRA or DoRA of PEFT; bake it first (only={name!r})")
    if step.init_lora_weights not in _SAME_BASE:
        raise RewriterError(
            f"{name}: {shown} starts from a change of the base, so that its base is not the plain model's; bake the "
            "model, or save it whole"
        )
    if len(entry.names) > 1:
        raise RewriterError(f"{name}: {', '.join(entry.names)} are tied, and PEFT changes one of them alone")
    path, _, attribute = name.rpartition(".")
    if attribute != "weight" or not path:
        raise RewriterError(f"{name}: PEFT changes the `weight` of a module inside the model, and nothing else")
    found, transposed = _tensors(name, step, entry.owners[0][0], site.spec.members[0].shape)
    return _Layer(
        path, step, {f"{PREFIX}{path}.{key}": one.contiguous().clone() for key, one in found.items()}, transposed
    )


def _tensors(name: str, step: Any, owner: Any, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors of PEFT's layer around `owner`, and whether it calls the weight transposed."""
    kind, dora = plain_class(owner), type(step) is Dora
    A, B = step.lora_A.detach(), step.lora_B.detach()
    if issubclass(kind, nn.Embedding) and not dora:
        return {"lora_embedding_A": B.mT, "lora_embedding_B": A.mT}, False
    if (
        any(f"{one.__module__}.{one.__name__}" == "transformers.pytorch_utils.Conv1D" for one in kind.__mro__)
        and not dora
    ):
        return {"lora_A.weight": B.mT, "lora_B.weight": A.mT}, True
    lengths: tuple[int, ...] = (-1,)
    if issubclass(kind, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and owner.groups == 1:
        ones = [1] * (len(shape) - 2)
        A, B, lengths = A.reshape(len(A), *shape[1:]), B.reshape(*B.shape, *ones), (1, -1, *ones)
    elif not issubclass(kind, nn.Linear):
        raise RewriterError(f"{name}: PEFT has no {'DoRA' if dora else 'LoRA'} that is the same for a {kind.__name__}")
    found = {"lora_A.weight": A, "lora_B.weight": B}
    return found | ({"lora_magnitude_vector": step.magnitude.detach().reshape(lengths)} if dora else {}), False


def _settings(layers: list[_Layer], base: str | None) -> dict[str, Any]:
    """Return PEFT's configuration; ranks and scales that are not equal in all layers go into its patterns."""
    common = [
        {
            "use_dora": type(layer.step) is Dora,
            "use_rslora": layer.step.use_rslora,
            "lora_dropout": layer.step.lora_dropout,
            "fan_in_fan_out": layer.transposed,
        }
        for layer in layers
    ]
    for layer, one in zip(layers, common, strict=True):
        for key, value in one.items():
            if value != common[0][key]:
                first, there = layers[0].path, common[0][key]
                raise RewriterError(f"{key} is {there} for {first} and {value} for {layer.path}; PEFT has one for all")
    ranks = {layer.path: layer.step.r for layer in layers}
    alphas = {layer.path: layer.step.lora_alpha for layer in layers}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        **common[0],
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": list(ranks),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{path}": own for path, own in ranks.items() if own != r},
        "alpha_pattern": {f"^{path}": own for path, own in alphas.items() if own != alpha},
    }
