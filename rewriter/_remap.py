"""Optimizers for models that were rewritten or baked, with the state that they had."""

from __future__ import annotations

import copy
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rewriter._given import check_model, kind_of
from rewriter.errors import RewriterError
from rewriter.planning import survey
from rewriter.sites import Site
from rewriter.sites._bridge import stored_value

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741

Key = tuple[Any, ...]
"""The coordinates of a parameter: those of the tensor's value, or a place in one chain."""
VALUE: Key = ("value",)


def remap_optimizer(optimizer: O, before: nn.Module, after: nn.Module) -> O:
    """Return an optimizer for the parameters of `after` with the state of the one for `before`.

    >>> import torch, rewriter
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    >>> spec = {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}
    >>> new = rewriter.rewrite(model, spec)
    >>> len(remap_optimizer(optimizer, model, new).param_groups[0]["params"])
    3

    `optimizer` does not change; build new learning-rate schedulers for the new one. ``rewrite(…, optimizer=optimizer)``
    and ``bake(…, optimizer=optimizer)`` change the optimizer itself, which keeps its schedulers.

    A parameter keeps its state if it has the same coordinates in both models: the same step stores it, or it is a
    weight in one model and in the other an original that the right inverse sets to the weight itself, as with
    `symmetric`, masks and the direction of `weight_norm`. Other parameters start without state, in the group of the
    tensor that they belong to. A warning names tensors whose state is lost. LBFGS always starts without history.
    Parameters of adapters on a frozen tensor join the optimizer if it has one group. Otherwise they form a new group,
    which a warning says.

    Arguments:
        optimizer: over parameters of `before`. Parameters of other models stay.
        before: the model the optimizer was built for.
        after: the model that `rewrite` or `bake` returned.

    Raises:
        RewriterError: the optimizer has no parameter of `before`, or one whose tensor is not in `after`.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RewriterError(f"remap_optimizer takes a torch optimizer first, not {kind_of(optimizer)}")
    for model in (before, after):
        check_model(model, "remap_optimizer", programs=False, wrapped=True)
    old = Parameters(before)
    if not any(id(parameter) in old.home for parameter in _grouped(optimizer)):
        raise RewriterError("the optimizer's parameters are not in the first model")
    move = _Move(optimizer, old, Parameters(after))
    if move.gone:
        raise RewriterError(
            f"the second model has no tensor {move.gone[0]}; pass what `rewrite` or `bake` made of the first model"
        )
    clone = _copied(optimizer)
    move.apply(clone, {tensor: (state if one is tensor else copy.deepcopy(state)) for one, tensor, state in move.kept})
    return clone


class Following:
    """An optimizer that will follow its model through a change.

    Arguments:
        optimizer: over parameters of the model.
        model: as it is before the change.
        verb: what changes it.

    Raises:
        RewriterError: it is no optimizer, or has no parameter of the model.
    """

    def __init__(self, optimizer: Any, model: Any, verb: str) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise RewriterError(f"optimizer= of {verb} takes a torch optimizer, not {kind_of(optimizer)}")
        if not isinstance(model, nn.Module):
            raise RewriterError(f"{verb} of an ExportedProgram takes no optimizer: build one for the new program")
        self.optimizer, self.before = optimizer, Parameters(model)
        if not any(id(parameter) in self.before.home for parameter in _grouped(optimizer)):
            raise RewriterError(f"optimizer= of {verb} has no parameter of the model")

    def follow(self, model: nn.Module) -> None:
        """Give the optimizer the parameters of the changed model."""
        move = _Move(self.optimizer, self.before, Parameters(model))
        move.apply(self.optimizer, {tensor: state for _, tensor, state in move.kept})


class Parameters:
    """The parameters of a model as they are now.

    Arguments:
        model: a plain or a rewritten model.

    Attributes:
        parts: for each tensor of the model the parameters behind it, by their coordinates.
        home: tensor and coordinates of each parameter.
        names: of the parameters in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.parts: dict[str, dict[Key, Tensor]] = {}
        known: dict[Any, int | None] = {}
        for entry in survey(model):
            if entry.site is not None:
                place = entry.site.position(entry.owners[0][1])
                self.parts[entry.name] = dict(_behind(entry.site, place, known))
            elif isinstance(entry.tensor, nn.Parameter):
                self.parts[entry.name] = {VALUE: entry.tensor}
        self.home = {id(tensor): (name, key) for name, part in self.parts.items() for key, tensor in part.items()}
        for name, parameter in model.named_parameters():
            if id(parameter) not in self.home:  # torch's parametrize computes a tensor from it
                self.parts[name], self.home[id(parameter)] = {VALUE: parameter}, (name, VALUE)


def _behind(site: Site, place: int, known: dict[Any, int | None]) -> Iterator[tuple[Key, Tensor]]:
    """Yield the parameters of a site with their coordinates."""
    record, seen = site.spec, Counter[str]()
    form = (*record.identity, place, tuple((one.shape, one.dtype) for one in site.originals))
    if form not in known:
        known[form] = stored_value(site, place)
    readers = [step for step, count in enumerate(record.stored) for _ in range(count)]
    places = [("original", record.chain[step], readers.index(step) - index) for index, step in enumerate(readers)]
    for index, original in enumerate(site.originals):
        if isinstance(original, nn.Parameter):
            own: Key = places[index] if index < len(places) else ("chunks that no chain computes",)
            yield VALUE if index == known[form] else own, original
    for text, step in zip(record.chain, site.steps, strict=True):
        for name, parameter in step.named_parameters():
            yield ("step", text, seen[text], name), parameter
        seen[text] += 1


@dataclass
class _Move:
    """What an optimizer has to have after its model changed; nothing changes until `apply`.

    Arguments:
        optimizer: as it is.
        old: parameters of the model before.
        new: parameters of the model after.

    Attributes:
        groups: the parameters of each group.
        kept: parameters with state, the parameter that has the state afterwards, and the state.
        added: trained parameters of tensors that were frozen, if no single group takes them.
        gone: names of tensors that the new model does not have.
    """

    optimizer: torch.optim.Optimizer
    old: Parameters
    new: Parameters
    groups: list[list[Tensor]] = field(default_factory=list)
    kept: list[tuple[Tensor, Tensor, Any]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.placed: set[int] = set()
        for group in self.optimizer.param_groups:
            self.groups.append([found for parameter in group["params"] for found in self._for(parameter)])
        self.added = [
            tensor
            for name, parts in self.new.parts.items()
            if not any(one.requires_grad for one in self.old.parts.get(name, {}).values())
            for tensor in parts.values()
            if tensor.requires_grad and id(tensor) not in self.placed
        ]
        if len(self.groups) == 1:
            self.groups[0] += self.added
            self.added = []
        order = {parameter: index for index, parameter in enumerate(self.new.names)}
        for group, members in zip(self.optimizer.param_groups, self.groups, strict=True):
            if _in_order(group["params"], self.old) and all(id(one) in order for one in members):
                members.sort(key=lambda one: order[id(one)])

    def _for(self, parameter: Tensor) -> Iterator[Tensor]:
        """Yield what stands in the place of a parameter."""
        if id(parameter) not in self.old.home:
            yield parameter  # of another model
            return
        name = self.old.home[id(parameter)][0]
        if name not in self.new.parts:
            yield from self._same_name(parameter)
            return
        for coordinates, tensor in self.new.parts[name].items():
            origin = self.old.parts[name].get(coordinates)
            if origin is not None and not _alike(origin, tensor):
                origin = None
            follows = origin is parameter if origin is not None else tensor.requires_grad or not parameter.requires_grad
            if follows and id(tensor) not in self.placed:
                yield self._place(tensor, origin)

    def _same_name(self, parameter: Tensor) -> Iterator[Tensor]:
        """Yield the parameter of the same name: of a tensor that another tool computed before it was absorbed."""
        name = self.old.names[id(parameter)]
        found = [
            tensor
            for parts in self.new.parts.values()
            for tensor in parts.values()
            if self.new.names.get(id(tensor)) == name and _alike(tensor, parameter)
        ]
        if not found:
            self.gone.append(name)
        elif id(found[0]) not in self.placed:
            yield self._place(found[0], parameter)

    def _place(self, tensor: Tensor, origin: Tensor | None) -> Tensor:
        self.placed.add(id(tensor))
        if origin is not None and origin in self.optimizer.state:
            self.kept.append((origin, tensor, self.optimizer.state[origin]))
        return tensor

    def apply(self, target: torch.optim.Optimizer, state: Mapping[Tensor, Any]) -> None:
        """Give an optimizer, the given one or its copy, the new parameters with their state."""
        lost = self._lost()
        for parameter in [one for one in target.state if id(one) in self.old.home]:
            del target.state[parameter]
        target.state.update(state)
        for group, members in zip(target.param_groups, self.groups, strict=True):
            if "param_names" in group:
                group["param_names"] = self._names(group, members)
            group["params"][:] = members
        self._add(target)
        if isinstance(target, torch.optim.LBFGS):  # its state is of all parameters together
            lost = []
            if target.state:
                _warn(target, "starts without history, which is of all parameters together")
            target.state.clear()
            target._params, target._numel_cache = target.param_groups[0]["params"], None
        if lost:
            _warn(target, f"starts without state for {_shown(lost)}: the parameters have other coordinates now")

    def _add(self, target: torch.optim.Optimizer) -> None:
        """Add a group for the trained parameters of tensors that were frozen."""
        if not self.added:
            return
        named = "param_names" in target.param_groups[0]
        names = [self.new.names[id(tensor)] for tensor in self.added]
        target.add_param_group({"params": [*zip(names, self.added, strict=True)] if named else self.added})
        _warn(target, f"has a new group, with its default settings, for {_shown(names)}")

    def _lost(self) -> list[str]:
        """Return the tensors that are trained on, and none of whose state is kept."""
        lost: list[str] = []
        kept = {id(origin) for origin, _, _ in self.kept}
        for name, parts in self.old.parts.items():
            had = {id(one) for one in parts.values() if one in self.optimizer.state}
            trained = any(one.requires_grad for one in self.new.parts.get(name, {}).values())
            if had and trained and not had & kept:
                lost.append(name)
        return [*lost, *self.gone]

    def _names(self, group: Mapping[str, Any], members: Sequence[Tensor]) -> list[str]:
        """Return the names of a group's new parameters, in the way in which its old ones have theirs."""
        before = {id(one): name for one, name in zip(group["params"], group["param_names"], strict=True)}
        prefix = ""
        for one, name in before.items():
            own = self.old.names.get(one)
            if own is not None and name.endswith(own):
                prefix = name.removesuffix(own)
                break
        return [prefix + self.new.names[id(one)] if id(one) in self.new.names else before[id(one)] for one in members]


def _warn(optimizer: torch.optim.Optimizer, text: str) -> None:
    warnings.warn(f"{type(optimizer).__name__} {text}", stacklevel=6)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _grouped(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _in_order(parameters: Sequence[Tensor], model: Parameters) -> bool:
    """Return whether parameters are in the model's order, as in an optimizer that is built for the model later."""
    order = {parameter: index for index, parameter in enumerate(model.names)}
    places = [order.get(id(parameter), -1) for parameter in parameters]
    return -1 not in places and places == sorted(places)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def _copied(optimizer: O) -> O:
    """Return a copy with groups and state of its own, over the same parameters."""
    kind: Any = type(optimizer)
    clone: Any = kind.__new__(kind)
    # A learning-rate scheduler wraps `step` of the instance. The copied wrapper would step the old optimizer.
    clone.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    for name, value in optimizer.__dict__.items():
        if name.startswith("_optimizer_") and isinstance(value, dict):
            clone.__dict__[name] = value.copy()
    clone.param_groups = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
    clone.state = defaultdict(dict, optimizer.state)
    return clone  # type: ignore[no-any-return]
