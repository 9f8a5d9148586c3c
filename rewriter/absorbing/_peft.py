"""PEFT's LoRA layers, which wrap a module, and its ``target_parameters``, which parametrize one at each call."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rewriter.absorbing._low_rank_change import LowRankChange
from rewriter.absorbing._source import Holder
from rewriter.errors import PlanError


def holders(module: nn.Module) -> Iterator[Holder]:
    """Find the tensor that a LoRA layer of PEFT changes."""
    if is_wrapper(module):
        yield _holder(module)


def is_wrapper(module: nn.Module) -> bool:
    """Whether `module` is an adapter layer of PEFT around a module."""
    # Without peft imported there is no such layer, and importing it takes seconds.
    if "peft" not in sys.modules or not hasattr(module, "base_layer"):
        return False
    return isinstance(module, importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what is left of `module` without PEFT: the base model, the base layer, the trained copy of a head."""
    if "peft" not in sys.modules:
        return module
    peft = importlib.import_module("peft")
    saved = importlib.import_module("peft.utils.other").ModulesToSaveWrapper
    tuner = importlib.import_module("peft.tuners.tuners_utils").BaseTuner
    current: Any = module
    while True:
        if isinstance(current, peft.PeftModel):
            current = current.base_model
        elif isinstance(current, tuner):
            current = current.model
        elif is_wrapper(current):
            current = current.base_layer
        elif isinstance(current, saved):
            active = current.active_adapters
            current = current.modules_to_save[active[0]] if active else current.original_module
        else:
            unwrapped: nn.Module = current
            return unwrapped


_MARKS = ("peft_config", "_hf_peft_config_loaded")
"""What PEFT, and transformers with it, leave on a model: with them it would save itself as adapters."""


def remove_wrappers(module: nn.Module) -> nn.Module:
    """Put every wrapped module below `module` in the place of its wrappers; return what stands for `module`."""
    module = unwrapped(module)
    for parent in list(module.modules()):
        for mark in _MARKS:
            parent.__dict__.pop(mark, None)
        for name, child in list(parent._modules.items()):
            if child is not None and unwrapped(child) is not child:
                parent._modules[name] = remove_wrappers(child)
    return module


def _holder(layer: Any) -> Holder:
    base: nn.Module = layer.get_base_layer()
    target = type(layer).__name__ == "ParamWrapper"
    tensor: str = layer.parameter_name if target else "weight"
    source = "peft.target_parameters" if target else "peft.lora"

    def steps() -> list[nn.Module]:
        return _steps(layer, base, tensor)

    return Holder(source, base, tensor, ((base, tensor),), steps, lambda: _delete(base, tensor))


def _delete(base: nn.Module, tensor: str) -> None:
    base._parameters.pop(tensor, None)


@torch.no_grad()
def _steps(layer: Any, base: nn.Module, tensor: str) -> list[nn.Module]:
    """Make one step for each active adapter; a merged layer is unmerged."""
    kind = type(layer)
    build = _BUILDERS.get(kind.__name__) if kind.__module__ == "peft.tuners.lora.layer" else None
    if build is None and kind.__module__.startswith(("peft.tuners.ia3", "peft.tuners.road")):
        what = "changes the output of the layer, its bias included"
        raise _refused(layer, what, "merge it with PEFT's merge_and_unload()")
    if build is None:
        raise _refused(layer, "is no LoRA layer of float weights", "merge it with PEFT's merge_and_unload()")
    known = {*layer.lora_A, *layer.lora_embedding_A}
    active = [name for name in layer.active_adapters if name in known]
    if layer.disable_adapters:
        raise _refused(layer, "has its adapters disabled", "enable them, or delete them from the model")
    if idle := sorted(known - set(active)):
        raise _refused(layer, f"has the idle adapters {', '.join(idle)}", "activate them or call delete_adapter")
    if layer.merged and set(layer.merged_adapters) != set(active):
        raise _refused(layer, "has merged only some of its adapters", "unmerge it first")
    for name in active:
        if layer.lora_bias.get(name):
            raise _refused(layer, "has a bias in its LoRA (lora_bias)", "merge it with PEFT's merge_and_unload()")
        variant = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else ""
        if variant not in ("", "DoraLinearVariant"):
            raise _refused(layer, f"is a variant of LoRA ({variant})", "merge it with PEFT's merge_and_unload()")
    if len(active) > 1 and any(name in layer.lora_variant for name in active):
        raise _refused(
            layer,
            f"adds the DoRA adapters {', '.join(active)} to the same base weight, which is no chain",
            "activate one of them, or merge them with PEFT's merge_and_unload()",
        )
    if getattr(base, "groups", 1) != 1:
        raise _refused(layer, "is on a grouped convolution", "merge it with PEFT's merge_and_unload()")
    if layer.merged:
        layer.unmerge()
    steps = [build(layer, name) for name in active]
    _check(layer, active, steps, getattr(base, tensor))
    return [*steps]


def _check(layer: Any, active: list[str], steps: Sequence[LowRankChange], weight: torch.Tensor) -> None:
    for name, step in zip(active, steps, strict=True):
        if step.dropout and layer.training:
            warnings.warn(
                f"the dropout of the adapter {name!r} becomes the same for a whole forward: a weight cannot differ "
                "between samples",
                stacklevel=2,
            )
        plain = LowRankChange(step.lora_A, step.lora_B, step.scaling, step.layout, step.experts).eval()
        expected = layer.get_delta_weight(name).to(weight.dtype)
        if expected.is_meta:
            continue
        found = plain.delta()
        same = found.numel() == expected.numel() and torch.allclose(
            found.reshape(expected.shape).to(expected.dtype), expected, rtol=1e-3, atol=1e-5
        )
        if not same:
            raise _refused(layer, "computes its change in another way", "merge it with PEFT's merge_and_unload()")


def _refused(layer: Any, what: str, hint: str) -> PlanError:
    return PlanError(f"a layer of PEFT ({type(layer).__name__}) {what}, and cannot be absorbed: {hint}")


def _dropout(layer: Any, name: str) -> float:
    return float(getattr(layer.lora_dropout[name], "p", 0.0)) if name in layer.lora_dropout else 0.0


def _linear(layer: Any, name: str) -> LowRankChange:
    layout = "transposed" if layer.fan_in_fan_out else "linear"
    magnitude = layer.lora_magnitude_vector[name].weight if layer.use_dora.get(name) else None
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return LowRankChange(A, B, layer.scaling[name], layout, 1, _dropout(layer, name), magnitude)


def _conv(layer: Any, name: str) -> LowRankChange:
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return LowRankChange(A, B, layer.scaling[name], "conv", 1, _dropout(layer, name))


def _embedding(layer: Any, name: str) -> LowRankChange:
    A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return LowRankChange(A, B, layer.scaling[name], "embedding")


def _parameter(layer: Any, name: str) -> LowRankChange:
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    if layer.num_experts == 1:
        return LowRankChange(A, B, layer.scaling[name], "linear")
    layout = "experts" if layer._did_swap_in_out_features else "experts_transposed"
    return LowRankChange(A, B, layer.scaling[name], layout, layer.num_experts)


_BUILDERS: dict[str, Callable[[Any, str], LowRankChange]] = {
    "Linear": _linear,
    "Conv1d": _conv,
    "Conv2d": _conv,
    "Conv3d": _conv,
    "Embedding": _embedding,
    "ParamWrapper": _parameter,
}
