"""The table of `torch.nn` modules that are one call of a function of their tensors.

A row maps a class to the function and to its arguments after those of the module's forward. A name with ``@`` is an
attribute that the graph reads when it runs: a tensor, or ``training``. Any other name is a setting, which is read
when the model is captured. Modules without a row stay one node of the graph, which gets its computed tensors as an
argument.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from rewriter.capture import _leaf_functions as functions
from rewriter.capture import _recurrent as recurrent
from rewriter.sites import plain_class, sites_of
from rewriter.sites._places import CONTAINER

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Own:
    """An argument that is an attribute of the module, read when the graph runs.

    Arguments:
        name: the attribute; dotted for one of a submodule.
    """

    name: str


@dataclass(frozen=True)
class LeafCall:
    """The function call that a module's call becomes.

    Arguments:
        function: what to call.
        arguments: those after the forward's own; an `Own`, also inside a list, is an attribute of the module.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    @functools.cached_property
    def names(self) -> set[str]:
        """The module's attributes that the function reads."""
        return {argument.name for argument in _flat(self.arguments) if isinstance(argument, Own)}


def _flat(arguments: Iterable[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, (tuple, list)):
            yield from _flat(argument)
        else:
            yield argument


Row = Callable[[Any], LeafCall]


def _row(function: Callable[..., Any], names: str, *constants: Any) -> Row:
    """Return a row: the function, the names of its further arguments, and what follows them."""
    words = names.split()
    if all(word.startswith("@") for word in words):
        call = LeafCall(function, (*(Own(word[1:]) for word in words), *constants))
        return lambda module: call

    def argument(module: nn.Module, word: str) -> Any:
        if word.startswith("@"):
            return Own(word[1:])
        value = getattr(module, word)
        return list(value) if isinstance(value, tuple) else value

    return lambda module: LeafCall(function, (*(argument(module, word) for word in words), *constants))


def _convolution(plain: Callable[..., Any]) -> Row:
    zeros = _row(plain, "@weight @bias stride padding dilation groups")
    padded = _row(
        functions.padded_conv, "@weight @bias _reversed_padding_repeated_twice padding_mode stride dilation groups"
    )
    return lambda module: zeros(module) if module.padding_mode == "zeros" else padded(module)


def _elman_cell(module: nn.RNNCell) -> LeafCall:
    return LeafCall(functions.cell, (*map(Own, _CELL), module.nonlinearity))


def _recurrent(function: Callable[..., Any], before: str, after: str) -> Row:
    settings = _row(
        function, f"{before} bias num_layers dropout @training bidirectional batch_first input_size hidden_size {after}"
    )

    def row(module: nn.RNNBase) -> LeafCall:
        weights = [Own(name) for name in module._flat_weights_names]
        return LeafCall(function, (weights, *settings(module).arguments))

    return row


_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_OWN_CELL = "@weight_ih @weight_hh @bias_ih @bias_hh"
_BATCH = "@weight @bias @running_mean @running_var @num_batches_tracked @training track_running_stats momentum eps"
_INSTANCE = "@weight @bias @running_mean @running_var @training track_running_stats momentum eps num_features"
_TRANSPOSED = _row(functions.conv_transpose, "@weight @bias stride padding output_padding groups dilation")

_TABLE: dict[type[nn.Module], Row] = {
    nn.Linear: _row(F.linear, "@weight @bias"),
    nn.Bilinear: _row(F.bilinear, "@weight @bias"),
    nn.PReLU: _row(F.prelu, "@weight"),
    nn.Conv1d: _convolution(F.conv1d),
    nn.Conv2d: _convolution(F.conv2d),
    nn.Conv3d: _convolution(F.conv3d),
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    nn.Embedding: _row(F.embedding, "@weight padding_idx max_norm norm_type scale_grad_by_freq sparse"),
    nn.EmbeddingBag: _row(
        functions.embedding_bag,
        "@weight max_norm norm_type scale_grad_by_freq mode sparse include_last_offset padding_idx",
    ),
    nn.BatchNorm1d: _row(functions.batch_norm, _BATCH, [2, 3]),
    nn.BatchNorm2d: _row(functions.batch_norm, _BATCH, [4]),
    nn.BatchNorm3d: _row(functions.batch_norm, _BATCH, [5]),
    nn.InstanceNorm1d: _row(functions.instance_norm, _INSTANCE, 2),
    nn.InstanceNorm2d: _row(functions.instance_norm, _INSTANCE, 3),
    nn.InstanceNorm3d: _row(functions.instance_norm, _INSTANCE, 4),
    nn.LayerNorm: _row(F.layer_norm, "normalized_shape @weight @bias eps"),
    nn.RMSNorm: _row(F.rms_norm, "normalized_shape @weight eps"),
    nn.GroupNorm: _row(F.group_norm, "num_groups @weight @bias eps"),
    nn.RNNCell: _elman_cell,
    nn.GRUCell: _row(functions.cell, _OWN_CELL, "gru"),
    nn.LSTMCell: _row(functions.lstm_cell, _OWN_CELL),
    nn.RNN: _recurrent(recurrent.recurrent, "mode", ""),
    nn.GRU: _recurrent(recurrent.recurrent, "mode", ""),
    nn.LSTM: _recurrent(recurrent.lstm, "", "proj_size"),
    nn.MultiheadAttention: _row(
        functions.attention,
        "@in_proj_weight @q_proj_weight @k_proj_weight @v_proj_weight @in_proj_bias @bias_k @bias_v @out_proj.weight "
        "@out_proj.bias @training embed_dim num_heads add_zero_attn dropout batch_first",
    ),
}


def leaf_call(module: nn.Module) -> LeafCall | None:
    """Return the function call for a module that runs the forward of a class in the table; a subclass has no row."""
    row = None if has_own_forward(module) else _TABLE.get(plain_class(module))
    return None if row is None else row(module)


def has_own_forward(module: nn.Module) -> bool:
    """Say whether the module's forward was replaced on the object itself."""
    return "forward" in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a user's hooks run when the module is called, its own or those for all modules: the call stays one."""
    own, for_all = vars(module), vars(nn.modules.module)
    return any(own.get(name) or for_all[f"_global{name}"] for name in _HOOKS)


def opens_up(module: nn.Module, tensor: str) -> bool:
    """Say whether the module's call becomes a function of the tensor that it, or a submodule, has by that name."""
    call = leaf_call(module)
    return call is not None and tensor in call.names


def reads_every_site(module: nn.Module, call: LeafCall) -> bool:
    """Say whether `module` has computed tensors, itself or below, and all of them are arguments of `call`."""
    computed = set(_computed(module, ""))
    return bool(computed) and computed <= call.names


def _computed(module: nn.Module, prefix: str) -> Iterator[str]:
    for tensor in sites_of(module):
        yield prefix + tensor
    for name, child in module._modules.items():
        if child is not None and name != CONTAINER:
            yield from _computed(child, f"{prefix}{name}.")


@functools.lru_cache(maxsize=1024)
def _signature_of(forward: Any) -> tuple[inspect.Signature, bool]:
    """Return the signature, and whether all its parameters can be given by position, one each."""
    signature = inspect.signature(forward)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    return signature, all(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)


def bind_call(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call of `module` in the order of its forward, defaults filled in."""
    signature, plain = _signature_of(plain_class(module).forward)
    if plain and not kwargs and len(args) == len(signature.parameters) - 1:
        return tuple(args)
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())[1:]
