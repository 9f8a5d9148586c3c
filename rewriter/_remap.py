"""Optimizers for models that were rewritten or baked, with the state that they had."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rewriter._given import check_model, kind_of
from rewriter.errors import RewriterError
from rewriter.planning import survey

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741

Parts = dict[str, Tensor]
"""The trainable tensors behind one tensor of a model: the parameter itself, or its site's originals and parameters."""


def remap_optimizer(optimizer: O, before: nn.Module, after: nn.Module) -> O:
    """Return an optimizer for the parameters of `after` with the state of the one for `before`.

    >>> import torch, rewriter
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    >>> spec = {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}
    >>> new = rewriter.rewrite(model, spec)
    >>> len(remap_optimizer(optimizer, model, new).param_groups[0]["params"])
    3

    A parameter keeps its state if both models have it under its own name. It also does as a weight in one model and as
    an original of the same shape and dtype in the other. Other parameters start without state, in the group of the
    tensor that they belong to. `optimizer` does not change. Build new learning-rate schedulers for the new one.

    Arguments:
        optimizer: over parameters of `before`.
        before: the model the optimizer was built for.
        after: the model that `rewrite` or `bake` returned.

    Raises:
        RewriterError: the optimizer has a parameter that is not in `before`, or whose tensor is not in `after`.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RewriterError(f"remap_optimizer takes a torch optimizer first, not {kind_of(optimizer)}")
    for model in (before, after):
        check_model(model, "remap_optimizer", programs=False, wrapped=True)
    old, new = _parts(before), _parts(after)
    owner = {id(tensor): (name, part) for name, home in old.items() for part, tensor in home.items()}
    state: dict[Tensor, Any] = defaultdict(dict)
    groups: list[dict[str, Any]] = []
    placed: set[int] = set()
    for group in optimizer.param_groups:
        members: list[Tensor] = []
        for parameter in group["params"]:
            if id(parameter) not in owner:
                raise RewriterError("the optimizer has a parameter that is not in the first model")
            name, part = owner[id(parameter)]
            if name not in new:
                raise RewriterError(
                    f"the second model has no tensor {name}; pass what `rewrite` or `bake` made of the first model"
                )
            successor = _successor(parameter, part, old[name], new[name])
            for tensor in new[name].values():
                joins = tensor is successor or (tensor.requires_grad and _new(tensor, old, new, name))
                if joins and id(tensor) not in placed:
                    placed.add(id(tensor))
                    members.append(tensor)
            if successor is not None and parameter in optimizer.state:
                entry = optimizer.state[parameter]
                state[successor] = entry if successor is parameter else copy.deepcopy(entry)
        groups.append({**group, "params": members})
    return _like(optimizer, groups, state)


def _parts(model: nn.Module) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for entry in survey(model):
        if entry.site is not None:
            found[entry.name] = dict(entry.site.named_parameters())
        elif isinstance(entry.tensor, nn.Parameter):
            found[entry.name] = {"": entry.tensor}
    return found


def _successor(parameter: Tensor, part: str, old: Parts, new: Parts) -> Tensor | None:
    """Return the tensor in `new` that gets the parameter's state."""
    for tensor in new.values():
        if tensor is parameter:
            return tensor
    if part in new and _alike(parameter, new[part]):
        return new[part]
    if part == "" or "" in new:
        candidates = old if part else new
        first = next((key for key in candidates if _alike(candidates[key], new.get("", parameter))), None)
        if part and first == part:
            return new[""]
        if not part and first is not None:
            return new[first]
    return None


def _new(tensor: Tensor, old: dict[str, Parts], new: dict[str, Parts], name: str) -> bool:
    """Return whether the tensor gets no old parameter's state: it then joins the group of its site."""
    return not any(_successor(parameter, part, old[name], new[name]) is tensor for part, parameter in old[name].items())


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def _like(optimizer: O, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> O:
    kind: Any = type(optimizer)
    clone: Any = kind.__new__(kind)
    # A learning-rate scheduler wraps `step` of the instance. The copied wrapper would step the old optimizer.
    clone.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    for name, value in optimizer.__dict__.items():
        if name.startswith("_optimizer_") and isinstance(value, dict):
            clone.__dict__[name] = value.copy()
    clone.param_groups, clone.state = groups, state
    if isinstance(optimizer, torch.optim.LBFGS):
        clone._params, clone._numel_cache, clone.state = groups[0]["params"], None, defaultdict(dict)
    return clone  # type: ignore[no-any-return]
