"""A state dict with the keys of PEFT's LoRA, turned into one of a model whose sites compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rewriter.parametrizations._adapters import Dora, Lora
from rewriter.serialization._adapter import SETTINGS
from rewriter.serialization._peft_folder import PREFIX, alpha, scale, sorted_parts
from rewriter.sites._bridge import StateError
from rewriter.sites._container import plain_class

if TYPE_CHECKING:
    from rewriter.sites._translation import Place

_PARTS = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
}
"""PEFT's names of the tensors of an adapter, and ours."""

_SAME_BASE = (True, "gaussian", "orthogonal")
"""Starts of ``lora`` that leave the base as it is."""


def is_adapter_state(state: Mapping[str, Any]) -> bool:
    """Whether the keys are those that PEFT gives to a wrapped model."""
    return bool(state) and all(str(key).startswith(PREFIX) for key in state)


def from_adapter(
    places: Sequence[Place], state: Mapping[str, Any], metadata: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the adapter's tensors with the keys of the rewritten model, and the model's own for the rest.

    Arguments:
        places: the sites of the model.
        state: the state dict of the adapter.
        metadata: of the state dict; it has the settings of the adapter.
        current: the state dict of the model.

    Raises:
        StateError: lists each key that has no site, each site without a key, and each setting that differs.
    """
    settings = metadata.get("", {}).get(SETTINGS)
    if not isinstance(settings, Mapping):
        raise StateError(
            "the state has the keys of a PEFT model, without the scale of its adapter: save it with PEFT's "
            "save_pretrained(folder), and load rewriter.io.read_adapter(folder)"
        )
    layers, others = sorted_parts(state)
    changes = {path: {_PARTS[part]: tensor for part, tensor in parts.items()} for path, parts in layers.items()}
    problems: list[str] = []
    made: dict[str, Any] = {}
    for place in places:
        change = changes.pop(place.path[:-1], {}) if place.tensors == ["weight"] else {}
        if change or any(isinstance(step, Lora) for step in place.site.steps):
            try:
                made.update(_tensors(place, change, settings))
            except StateError as problem:
                problems.append(str(problem))
    problems += [
        f"{path}.weight: the adapter changes it, and no chain of the model computes it: add it to the rule's selector"
        for path in changes
    ]
    computed = {name: place.prefix for place in places for name in place.names}
    problems += [f"{name}: the model has no such tensor" for name in others if name not in {*current, *computed}]
    if problems:
        raise StateError("\n\t".join(["the PEFT adapter does not fit the model:", *problems]))
    replaced = tuple(prefix for name, prefix in computed.items() if name in others)
    kept = {key: tensor for key, tensor in current.items() if not key.startswith(replaced)}
    return {**kept, **others, **made}


def _tensors(place: Place, change: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of one site's step, once it is certain that it computes what PEFT's layer does."""
    site, name = place.site, place.names[0]
    if not change:
        raise StateError(f"{name}: the adapter does not change it: leave it out with `except` in the rule")
    wanted = _wanted(place.path[:-1], change, settings)
    step: Any = site.steps[0]
    shown = " >> ".join(site.spec.chain)
    kind = Dora if settings.get("use_dora") else Lora
    if len(site.steps) != 1 or type(step) is not kind or not site.spec.simple:
        raise StateError(f"{name}: the adapter computes {wanted}, and the model {shown}: let the chain be {wanted}")
    if len(site.spec.members[0].names) > 1:
        names = ", ".join(site.spec.members[0].names)
        raise StateError(f"{name}: {names} are tied, and PEFT changes one of them alone: untie them first")
    read = _layout(name, place.owner, kind)
    _check_start(name, step, settings.get("init_lora_weights", True))
    needed = ["lora_A", "lora_B", *(["magnitude"] if kind is Dora else [])]
    if sorted(change) != needed:
        raise StateError(f"{name}: the adapter has {', '.join(sorted(change))} for it, and not {', '.join(needed)}")
    tensors = dict(zip(needed, (*read(change), *(change[key].reshape(-1, 1) for key in needed[2:])), strict=True))
    rank = tensors["lora_A"].shape[0]
    factor = scale(place.path[:-1], rank, settings)
    if step.r != rank or not math.isclose(step.scaling, factor, rel_tol=1e-9):
        raise StateError(
            f"{name}: the adapter has rank {rank} and scale {factor:.6g}, and {shown} has rank {step.r} and scale "
            f"{step.scaling:.6g}: let the chain be {wanted}"
        )
    for key, tensor in tensors.items():
        own = getattr(step, key)
        if tensor.shape != own.shape:
            raise StateError(f"{name}: {key} of the adapter is {[*tensor.shape]}, and here {[*own.shape]}")
    return {f"{place.prefix}0.{key}": tensor for key, tensor in tensors.items()}


def _wanted(path: str, change: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Return the step that computes what the adapter does, as a spec has it."""
    rank = len(change["lora_A"]) if "lora_A" in change else settings.get("r", 8)
    stabilised = ", use_rslora: true" if settings.get("use_rslora") else ""
    name = "dora" if settings.get("use_dora") else "lora"
    return f"{name}: {{r: {rank}, lora_alpha: {alpha(path, settings)}{stabilised}}}"


def _check_start(name: str, step: Lora, theirs: Any) -> None:
    """Refuse a start that gives the model another base than the adapter was trained on."""
    ours: Any = step.init_lora_weights
    plain = (*_SAME_BASE, False, "eva")
    if theirs not in (*plain, "pissa", "olora"):
        raise StateError(
            f"{name}: init_lora_weights={theirs!r:.40} of the adapter changes the base in a way that no step has: "
            "merge it with PEFT's merge_and_unload() and load the merged weights"
        )
    wanted = "true" if theirs in plain else str(theirs)
    if ours not in _SAME_BASE if theirs in plain else ours != theirs:
        raise StateError(
            f"{name}: the site's base is the weight less the start {ours!r}, and the adapter's starts from "
            f"{theirs!r}: write init_lora_weights: {wanted} in the spec"
        )


def _layout(name: str, owner: nn.Module, kind: type[Lora]) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]:
    """Return what reads A and B of our step from those of PEFT's layer around this one."""
    plain = plain_class(owner)
    conv1d = any((base.__module__, base.__name__) == ("transformers.pytorch_utils", "Conv1D") for base in plain.__mro__)
    if conv1d or issubclass(plain, nn.Embedding):
        if kind is Dora:
            raise StateError(
                f"{name}: PEFT's DoRA of a {plain.__name__} has one length for each column of the weight, and dora one "
                "for each row: merge the adapter with PEFT's merge_and_unload() and load the merged weights"
            )
        return _transposed
    convolution = issubclass(plain, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and getattr(owner, "groups", 1) == 1
    if convolution or issubclass(plain, nn.Linear):
        return _flat
    raise StateError(
        f"{name}: PEFT adapters load into linear layers, embeddings and convolutions of one group, not into "
        f"{plain.__name__}: merge the adapter with PEFT's merge_and_unload() and load the merged weights"
    )


def _flat(change: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return change["lora_A"].flatten(1), change["lora_B"].flatten(1)


def _transposed(change: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return change["lora_B"].mT, change["lora_A"].mT
