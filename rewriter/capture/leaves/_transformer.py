"""Transformer, its encoder and decoder, and their layers: calls of their attentions, linear layers and norms.

The fused kernel that torch's encoder layer takes where no gradients are asked for is left out: it rounds differently,
and it takes weights by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from rewriter.capture._expansions import Expanded, Parts, expands, has_parts
from rewriter.capture.leaves._masks import float_masks
from rewriter.serialization._functions import graph_function, name_of_function

_FEED_FORWARD = ("linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")


@graph_function
def encoder_layer_inputs(
    src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """Return the arguments of a `torch.nn.TransformerEncoderLayer`, with masks of floats."""
    mask, padding = float_masks(src_mask, src_key_padding_mask, src.dtype, "src_mask", "src_key_padding_mask")
    return src, mask, padding, is_causal


@graph_function
def encoder_inputs(
    src: Tensor,
    mask: Tensor | None,
    src_key_padding_mask: Tensor | None,
    is_causal: bool | None,
    batch_first: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """Return what the layers of a `torch.nn.TransformerEncoder` are called with."""
    floats, padding = float_masks(mask, src_key_padding_mask, src.dtype, "mask", "src_key_padding_mask")
    return src, floats, padding, _detect_is_causal_mask(floats, is_causal, _get_seq_len(src, batch_first))


@graph_function
def zeros_at_padding(
    output: Tensor,
    src: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    training: bool,
    mask_check: bool,
) -> Tensor:
    """Return `output` with zeros where a `torch.nn.TransformerEncoder` would have left the padding out.

    It packs a padded batch into a nested tensor where no gradients are asked for and its layers' fused kernel can run,
    and unpacks the result with zeros. Elsewhere the padded positions hold what the layers make of them.
    """
    if padding is None or mask is not None or training or src.dim() != 3 or output.requires_grad:
        return output
    if not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled():
        return output
    kept = padding.logical_not()
    if mask_check:
        if torch.compiler.is_compiling():
            return output
        if not torch._nested_tensor_from_mask_left_aligned(src, kept):
            return output
    return output.masked_fill(kept.logical_not().unsqueeze(-1), 0.0)


@graph_function
def decoder_layer_inputs(
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None,
    memory_mask: Tensor | None,
    tgt_key_padding_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
    tgt_is_causal: bool,
    memory_is_causal: bool,
) -> Tensor:
    """Return the target of a `torch.nn.TransformerDecoderLayer`, which takes the rest as it is."""
    return tgt


@graph_function
def decoder_inputs(
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None,
    memory_mask: Tensor | None,
    tgt_key_padding_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
    tgt_is_causal: bool | None,
    memory_is_causal: bool,
    batch_first: bool,
) -> tuple[Tensor, bool]:
    """Return the target of a `torch.nn.TransformerDecoder`, and whether its mask is causal."""
    return tgt, _detect_is_causal_mask(tgt_mask, tgt_is_causal, _get_seq_len(tgt, batch_first))


@graph_function
def transformer_inputs(
    src: Tensor,
    tgt: Tensor,
    src_mask: Tensor | None,
    tgt_mask: Tensor | None,
    memory_mask: Tensor | None,
    src_key_padding_mask: Tensor | None,
    tgt_key_padding_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
    src_is_causal: bool | None,
    tgt_is_causal: bool | None,
    memory_is_causal: bool,
    batch_first: bool,
    d_model: int,
) -> tuple[Tensor, Tensor]:
    """Return source and target of a `torch.nn.Transformer`, checked as it checks them."""
    batch = 0 if batch_first else 1
    if src.dim() == 3 and src.size(batch) != tgt.size(batch):
        raise RuntimeError("the batch number of src and tgt must be equal")
    if src.size(-1) != d_model or tgt.size(-1) != d_model:
        raise RuntimeError("the feature number of src and tgt must be equal to d_model")
    return src, tgt


def _activation(layer: nn.Module) -> Callable[[Parts, Any], Any] | None:
    """Return what writes a call of the layer's activation; None for a function that a graph has no name for."""
    function: Any = layer.activation
    # A copy of a decoder layer may have both: torch's __setstate__ puts a function over the module.
    if function is layer._modules.get("activation"):
        return lambda parts, x: parts.call("activation", x)
    if not isinstance(function, (FunctionType, BuiltinFunctionType)):
        return None
    named = getattr(sys.modules.get(function.__module__ or ""), function.__qualname__, None) is function
    if not named and name_of_function(function) is None:
        return None
    return lambda parts, x: parts.apply(function, x)


@expands(nn.TransformerEncoderLayer)
def encoder_layer(layer: nn.TransformerEncoderLayer) -> Expanded | None:
    activation = _activation(layer)
    if activation is None or not has_parts(layer, ("self_attn", *_FEED_FORWARD)):
        return None

    def body(parts: Parts, entered: Any, given: tuple[Any, ...]) -> Any:
        x = entered[0]
        mask = None if given[1] is None else entered[1]
        padding = None if given[2] is None else entered[2]
        causal = entered[3]

        def attend(x: Any) -> Any:
            return parts.call("dropout1", _attended(parts, "self_attn", x, x, mask, padding, causal))

        def feed(x: Any) -> Any:
            hidden = parts.call("dropout", activation(parts, parts.call("linear1", x)))
            return parts.call("dropout2", parts.call("linear2", hidden))

        return _residual(parts, x, [attend, feed], layer.norm_first)

    return Expanded(encoder_layer_inputs, (), body)


@expands(nn.TransformerDecoderLayer)
def decoder_layer(layer: nn.TransformerDecoderLayer) -> Expanded | None:
    activation = _activation(layer)
    if activation is None or not has_parts(layer, ("self_attn", "multihead_attn", *_FEED_FORWARD, "norm3", "dropout3")):
        return None

    def body(parts: Parts, entered: Any, given: tuple[Any, ...]) -> Any:
        _, memory, mask, memory_mask, padding, memory_padding, causal, memory_causal = given

        def attend(x: Any) -> Any:
            return parts.call("dropout1", _attended(parts, "self_attn", x, x, mask, padding, causal))

        def attend_memory(x: Any) -> Any:
            found = _attended(parts, "multihead_attn", x, memory, memory_mask, memory_padding, memory_causal)
            return parts.call("dropout2", found)

        def feed(x: Any) -> Any:
            hidden = parts.call("dropout", activation(parts, parts.call("linear1", x)))
            return parts.call("dropout3", parts.call("linear2", hidden))

        return _residual(parts, entered, [attend, attend_memory, feed], layer.norm_first)

    return Expanded(decoder_layer_inputs, (), body)


def _attended(parts: Parts, name: str, x: Any, memory: Any, mask: Any, padding: Any, causal: Any) -> Any:
    masks = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": causal}
    return parts.call(name, x, memory, memory, need_weights=False, **masks)[0]


def _residual(parts: Parts, x: Any, blocks: list[Callable[[Any], Any]], norm_first: bool) -> Any:
    for number, block in enumerate(blocks, 1):
        norm = f"norm{number}"
        x = x + block(parts.call(norm, x)) if norm_first else parts.call(norm, x + block(x))
    return x


def _batch_first(stack: nn.TransformerEncoder | nn.TransformerDecoder) -> bool | None:
    """Return what the first layer says of its inputs; None where it is no layer that can say it."""
    first: Any = next(iter(stack.layers), None) if isinstance(stack.layers, nn.ModuleList) else None
    found = getattr(getattr(first, "self_attn", None), "batch_first", None)
    return found if isinstance(found, bool) else None


@expands(nn.TransformerEncoder)
def encoder(stack: nn.TransformerEncoder) -> Expanded | None:
    batch_first = _batch_first(stack)
    if batch_first is None:
        return None

    def body(parts: Parts, entered: Any, given: tuple[Any, ...]) -> Any:
        x = src = entered[0]
        mask = None if given[1] is None else entered[1]
        padding = None if given[2] is None else entered[2]
        causal = entered[3]
        for index in range(len(stack.layers)):
            x = parts.call(f"layers.{index}", x, src_mask=mask, is_causal=causal, src_key_padding_mask=padding)
        if padding is not None and getattr(stack, "use_nested_tensor", False):
            training, check = parts.read("layers.0.training"), bool(getattr(stack, "mask_check", True))
            x = parts.apply(zeros_at_padding, x, src, mask, padding, training, check)
        return x if stack.norm is None else parts.call("norm", x)

    return Expanded(encoder_inputs, (batch_first,), body)


@expands(nn.TransformerDecoder)
def decoder(stack: nn.TransformerDecoder) -> Expanded | None:
    batch_first = _batch_first(stack)
    if batch_first is None:
        return None

    def body(parts: Parts, entered: Any, given: tuple[Any, ...]) -> Any:
        _, memory, mask, memory_mask, padding, memory_padding, _, memory_causal = given
        masks = {"tgt_mask": mask, "memory_mask": memory_mask}
        masks |= {"tgt_key_padding_mask": padding, "memory_key_padding_mask": memory_padding}
        x, causal = entered[0], entered[1]
        for index in range(len(stack.layers)):
            x = parts.call(f"layers.{index}", x, memory, **masks, tgt_is_causal=causal, memory_is_causal=memory_causal)
        return x if stack.norm is None else parts.call("norm", x)

    return Expanded(decoder_inputs, (batch_first,), body)


@expands(nn.Transformer)
def transformer(module: nn.Transformer) -> Expanded | None:
    if not has_parts(module, ("encoder", "decoder")):
        return None

    def body(parts: Parts, entered: Any, given: tuple[Any, ...]) -> Any:
        _, _, mask, tgt_mask, memory_mask, padding, tgt_padding, memory_padding, *causal = given
        memory = parts.call("encoder", entered[0], mask=mask, src_key_padding_mask=padding, is_causal=causal[0])
        return parts.call(
            "decoder",
            entered[1],
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_padding,
            memory_key_padding_mask=memory_padding,
            tgt_is_causal=causal[1],
            memory_is_causal=causal[2],
        )

    return Expanded(transformer_inputs, (module.batch_first, module.d_model), body)
