"""Which parameters of a rewritten model an optimizer lacks."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from rewriter._given import check_model, kind_of
from rewriter.errors import RewriterError
from rewriter.sites import CONTAINER, Site

_ADVICE = (
    "Give rewrite or bake optimizer=, or use rewriter.state.remap_optimizer(optimizer, before, after); freeze what is "
    "not to be trained"
)
_LOOKS = 10
"""How many steps are looked at before unused parameters count as meant."""


def named_sites(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters behind each computed tensor, by the tensor's name and their own, in the model's order.

    >>> import torch, rewriter
    >>> spec = {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}
    >>> model = rewriter.rewrite(torch.nn.Sequential(torch.nn.Linear(3, 3)), spec)
    >>> for name, parameters in named_sites(model).items():
    ...     print(name, list(parameters))
    0.weight ['0.parametrizations.weight.original0', '0.parametrizations.weight.original1']

    The names of the parameters are those of ``model.named_parameters()``.

    Arguments:
        model: a rewritten model, or one that contains rewritten models.
    """
    check_model(model, "named_sites", programs=False, wrapped=True)
    sites: dict[str, dict[str, nn.Parameter]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Site):
            container, _, tensor = path.rpartition(".")
            parameters = {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
            sites[container.removesuffix(CONTAINER) + tensor] = parameters
    return sites


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Return what is wrong with an optimizer for `model`, one sentence for each parameter; empty if nothing is.

    >>> import torch, rewriter
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    >>> optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    >>> spec = {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}
    >>> for problem in check_optimizer(optimizer, rewriter.rewrite(model, spec, inplace=True)):
    ...     print(problem)
    0.parametrizations.weight.original0: a trained parameter that no group of the optimizer has

    The list has the trained parameters of the model that no group has. It also has the parameters of the optimizer that
    the model does not have: those of the model before it was rewritten or baked. They have names where the
    optimizer was built from ``named_parameters()``.

    Arguments:
        optimizer: any torch optimizer.
        model: a plain or a rewritten model.

    Raises:
        RewriterError: the arguments are something else.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RewriterError(f"check_optimizer takes a torch optimizer first, not {kind_of(optimizer)}")
    check_model(model, "check_optimizer", programs=False, wrapped=True)
    grouped = _grouped(optimizer)
    own = {id(parameter) for parameter in model.parameters()}
    problems = [
        f"{name}: a trained parameter that no group of the optimizer has"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in grouped
    ]
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in own:
                name = names[index] if names else f"parameter {index} of group {number}"
                problems.append(f"{name}: of shape {list(parameter.shape)}, and the model does not have it")
    return problems


class _Watched:
    """A rewritten model until one optimizer of it is known to be right.

    Arguments:
        model: the rewritten model.
        before: the parameters of the model that was rewritten.
    """

    def __init__(self, model: nn.Module, before: Iterable[Tensor]) -> None:
        self.model = weakref.ref(model, lambda _: _forget(self))
        self.before = [weakref.ref(parameter) for parameter in before]
        self.unrelated: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.looks = 0

    def is_done(self, optimizer: torch.optim.Optimizer) -> bool:
        """Look at an optimizer that made a step, and warn of parameters that it lacks; whether that was the last look.

        Parameters without a gradient may not be used yet: a few more steps are looked at.
        """
        model = self.model()
        if model is None:
            return True
        if optimizer in self.unrelated:
            return False
        grouped, own = _grouped(optimizer), {id(parameter) for parameter in model.parameters()}
        before = {id(parameter) for reference in self.before if (parameter := reference()) is not None} - own
        if not grouped & (own | before):
            self.unrelated.add(optimizer)
            return False
        self.looks += 1
        lacking = [(name, parameter) for name, parameter in _trained(model) if id(parameter) not in grouped]
        used = {name: parameter for name, parameter in lacking if parameter.grad is not None}
        if lacking and not used:
            return self.looks >= _LOOKS
        if used:
            elsewhere = set().union(*map(_grouped, _optimizers()))
            names = [name for name, parameter in used.items() if id(parameter) not in elsewhere]
            if names:
                _warn(type(optimizer).__name__, names, stale=bool(grouped & before))
        return True


def _warn(kind: str, names: list[str], stale: bool) -> None:
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    has_others = " It has parameters of the model before it was rewritten." if stale else ""
    warnings.warn(
        f"{kind} made a step, and no optimizer has these trained parameters of the rewritten model: {shown}."
        f"{has_others} {_ADVICE}",
        stacklevel=5,
    )


_watched: list[_Watched] = []
_hook: Any = None


def watch_optimizers(model: nn.Module, before: Iterable[Tensor]) -> None:
    """Warn once if an optimizer steps that leaves out parameters behind the computed tensors of `model`.

    A hook of torch for all optimizers looks at each step until one optimizer has all of them, or the model is
    collected. Copies of the model are not watched.

    Arguments:
        model: a rewritten model.
        before: the parameters of the model that was rewritten.
    """
    global _hook
    if any(watched.model() is model for watched in _watched):
        return
    _watched.append(_Watched(model, before))
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for watched in [*_watched]:
        if watched.is_done(optimizer):
            _forget(watched)


def _forget(watched: _Watched) -> None:
    # The hook stays: torch iterates over the hooks of all optimizers when it calls this one.
    if watched in _watched:
        _watched.remove(watched)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for parameters in named_sites(model).values():
        yield from ((name, parameter) for name, parameter in parameters.items() if parameter.requires_grad)


def _grouped(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _optimizers() -> list[torch.optim.Optimizer]:
    """Return all optimizers that are alive: one that has its turn later is no fault.

    The collector is asked once, right before a warning. `isinstance` would run code of proxies.
    """
    found = [one for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer)]
    return [one for one in found if "param_groups" in vars(one)]
