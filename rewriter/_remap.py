"""An optimizer for a model that was rewritten or baked, with the state of the one it had."""

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

Home = dict[str, Tensor]
"""The trainable tensors behind one tensor of a model: itself, or what its chain is made of."""


def remap_optimizer(optimizer: O, before: nn.Module, after: nn.Module) -> O:
    """Return an optimizer for the parameters of `after` that goes on where the one for `before` stands.

    >>> import torch, rewriter
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    >>> spec = {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}
    >>> new = rewriter.rewrite(model, spec)
    >>> len(remap_optimizer(optimizer, model, new).param_groups[0]["params"])
    3

    A parameter keeps its state where it is in both models: under its own name, or as the stored tensor of its form
    in the place of a weight, and back. All others start without state, in the group of the tensor they belong to.
    `optimizer` stays as it is; learning-rate schedulers have to be built for the new one.

    Arguments:
        optimizer: over parameters of `before`.
        before: the model the optimizer was built for.
        after: what `rewrite` or `bake` made of it.

    Raises:
        RewriterError: the optimizer holds a parameter that `before` has not, or that `after` has no place for.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RewriterError(f"remap_optimizer takes a torch optimizer first, not {kind_of(optimizer)}")
    for model in (before, after):
        check_model(model, "remap_optimizer", programs=False)
    old, new = _homes(before), _homes(after)
    owner = {id(tensor): (name, part) for name, home in old.items() for part, tensor in home.items()}
    state: dict[Tensor, Any] = defaultdict(dict)
    groups: list[dict[str, Any]] = []
    placed: set[int] = set()
    for group in optimizer.param_groups:
        members: list[Tensor] = []
        for parameter in group["params"]:
            if id(parameter) not in owner:
                raise RewriterError("the optimizer holds a parameter that is not one of the model it was built for")
            name, part = owner[id(parameter)]
            if name not in new:
                raise RewriterError(f"{name} is no tensor of the new model; was it made of the old one?")
            kept = _kept(parameter, part, old[name], new[name])
            for tensor in new[name].values():
                joins = tensor is kept or (tensor.requires_grad and _new(tensor, old, new, name))
                if joins and id(tensor) not in placed:
                    placed.add(id(tensor))
                    members.append(tensor)
            if kept is not None and parameter in optimizer.state:
                entry = optimizer.state[parameter]
                state[kept] = entry if kept is parameter else copy.deepcopy(entry)
        groups.append({**group, "params": members})
    return _like(optimizer, groups, state)


def _homes(model: nn.Module) -> dict[str, Home]:
    homes: dict[str, Home] = {}
    for entry in survey(model):
        if entry.site is not None:
            homes[entry.name] = dict(entry.site.named_parameters())
        elif isinstance(entry.tensor, nn.Parameter):
            homes[entry.name] = {"": entry.tensor}
    return homes


def _kept(parameter: Tensor, part: str, old: Home, new: Home) -> Tensor | None:
    """Return the tensor in `new` that goes on with the parameter's state."""
    for tensor in new.values():
        if tensor is parameter:
            return tensor
    if part in new and _same_form(parameter, new[part]):
        return new[part]
    if part == "" or "" in new:
        candidates = old if part else new
        first = next((key for key in candidates if _same_form(candidates[key], new.get("", parameter))), None)
        if part and first == part:
            return new[""]
        if not part and first is not None:
            return new[first]
    return None


def _new(tensor: Tensor, old: dict[str, Home], new: dict[str, Home], name: str) -> bool:
    """Whether no parameter of the old model goes on in this one, which then joins its neighbours."""
    return not any(_kept(parameter, part, old[name], new[name]) is tensor for part, parameter in old[name].items())


def _same_form(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def _like(optimizer: O, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> O:
    kind: Any = type(optimizer)
    clone: Any = kind.__new__(kind)
    # A learning-rate scheduler wraps `step` of the instance; the wrapper would step the old optimizer.
    clone.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    for name, value in optimizer.__dict__.items():
        if name.startswith("_optimizer_") and isinstance(value, dict):
            clone.__dict__[name] = value.copy()
    clone.param_groups, clone.state = groups, state
    if isinstance(optimizer, torch.optim.LBFGS):
        clone._params, clone._numel_cache, clone.state = groups[0]["params"], None, defaultdict(dict)
    return clone  # type: ignore[no-any-return]
