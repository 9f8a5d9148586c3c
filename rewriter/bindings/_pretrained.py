"""Models of the transformers library: what their own methods need to know of computed tensors.

Their methods look tensors up by name, among the parameters, where a computed tensor is not.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from rewriter.errors import RewriterError
from rewriter.serialization._names import loadable
from rewriter.sites._container import Sites, sites_of
from rewriter.sites._places import CONTAINER

_BASE = ("transformers.modeling_utils", "PreTrainedModel")


def is_pretrained(plain: type) -> bool:
    """Whether `plain` is a model class of transformers; which is not imported for that."""
    return any((kind.__module__, kind.__name__) == _BASE for kind in plain.__mro__)


def refuse_saving(model: nn.Module, baked: Iterable[str]) -> None:
    """Let `save_pretrained` raise in each model of which the class computes one of the `baked` tensors itself.

    Such a class (wav2vec 2.0, HuBERT, WavLM, EnCodec) applies weight_norm in its constructor. `from_pretrained` then
    finds no value for what it starts from in the file of a baked model, and the model computes NaN.

    Arguments:
        baked: the names of the tensors in `model`.
    """
    names = list(baked)
    for path, module in model.named_modules() if names else ():
        if is_pretrained(type(module)):
            prefix = f"{path}." if path else ""
            made = _names_of_new(module)
            if any(_is_computed(name.removeprefix(prefix), made) for name in names if name.startswith(prefix)):
                module.__dict__["save_pretrained"] = save_pretrained


def _is_computed(name: str, names: set[str]) -> bool:
    owner, _, tensor = f".{name}".rpartition(".")
    stored = [f"{owner}.{CONTAINER}.{tensor}.original", f"{owner}.{CONTAINER}.{tensor}.original0"]
    stored += [f".{name}_g", f".{name}_orig"]  # torch's older functions
    return any(candidate[1:] in names for candidate in stored)


def _names_of_new(model: Any) -> set[str]:
    """Return the names of the tensors in a new model of this class."""
    with torch.random.fork_rng(), torch.device("meta"):
        try:
            made: nn.Module = type(model)(copy.deepcopy(model.config))
        except Exception:  # not the constructor that from_pretrained calls
            return set()
    return {name for name, _ in made.named_parameters(remove_duplicate=False)}


@loadable()
def save_pretrained(*_: Any, **__: Any) -> NoReturn:
    """Stand in for the method of a baked model that `from_pretrained` could not read."""
    raise RewriterError(
        "from_pretrained cannot read this model: its class applies weight_norm, or another parametrization, in its "
        "constructor, and bake made the tensor plain. Call save_pretrained before bake, or leave these tensors out of "
        "bake with only=[…]. To save the plain tensors, use rewriter.io.save_model or torch.save(model.state_dict(), …)"
    )


def methods_of(plain: Any) -> dict[str, Any]:
    """Return the methods of `plain` that differ in a model of which tensors are computed."""

    def expanded(self: Any, all_submodels: bool = False) -> Any:
        model = self if all_submodels else _WithComputed(self)
        return plain.get_expanded_tied_weights_keys(model, all_submodels=all_submodels)

    def resized(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *rest: Any, **options: Any
    ) -> Any:
        _refuse_other_size(self, new_num_tokens, pad_to_multiple_of)
        return plain.resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, *rest, **options)

    def saved(
        self: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *rest: Any, **options: Any
    ) -> Any:
        warnings.warn(
            f"{save_directory} will hold the tensors that the parametrizations start from, for load_state_dict on a "
            "model rewritten alike; from_pretrained cannot read them: save bake(model) for that",
            stacklevel=2,
        )
        again = tuple(_further_names(self))
        tensors = self.state_dict() if state_dict is None else state_dict
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(again)}
        if "save_original_format" in inspect.signature(plain.save_pretrained).parameters:
            options.setdefault("save_original_format", False)  # the names that load_state_dict takes
        return plain.save_pretrained(self, save_directory, is_main_process, kept, *rest, **options)

    methods: dict[str, Any] = {
        "get_expanded_tied_weights_keys": expanded,
        "resize_token_embeddings": resized,
        "save_pretrained": saved,
    }
    return {name: functools.wraps(getattr(plain, name))(made) for name, made in methods.items() if hasattr(plain, name)}


class _WithComputed:
    """A model of which the names of parameters include those of the computed ones, and not what these start from."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        for name, parameter in self.model.named_parameters(prefix, recurse, remove_duplicate):
            if CONTAINER not in name.split("."):
                yield name, parameter
        yield from _computed(self.model, "parameter")

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        for name, buffer in self.model.named_buffers(prefix, recurse, remove_duplicate):
            if CONTAINER not in name.split("."):
                yield name, buffer
        yield from _computed(self.model, "buffer")


def _computed(model: nn.Module, kind: str) -> Iterator[tuple[str, None]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for tensor, site in sites_of(module).items():
            if site.member(tensor).kind == kind:
                yield f"{path}.{tensor}" if path else tensor, None


def _further_names(model: nn.Module) -> Iterator[str]:
    """Yield what the state dict's keys begin with where they name a tied tensor's site once more."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Sites):
            yield from (f"{path}.{tensor}." for tensor in module.owned_elsewhere)


def _refuse_other_size(model: Any, tokens: int | None, multiple: int | None) -> None:
    if tokens is None and multiple is None:
        return
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not isinstance(end, nn.Module) or not sites_of(end):
            continue
        tensor, site = next(iter(sites_of(end).items()))
        size = site.member(tensor).shape[0]
        wanted = math.ceil((tokens or size) / (multiple or 1)) * (multiple or 1)
        if wanted != size:
            raise RewriterError(
                f"{site.spec.name} is computed by {' >> '.join(site.spec.chain)} for {size} tokens and cannot be "
                f"resized to {wanted}: resize what bake(model) gives, then rewrite it again"
            )
