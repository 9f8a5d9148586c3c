"""Values of computed tensors: read, set, frozen, invalidated."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewriter._bake import _chosen, _present
from rewriter._fsdp import reshard
from rewriter._given import check_model, is_distributed, is_managed
from rewriter._originals import NOTHING_COMPUTED
from rewriter.errors import PlanError
from rewriter.parametrizations._registry import suggestion
from rewriter.planning import Entry, survey
from rewriter.sites import Site, assign_value, check_shape
from rewriter.sites._shards import as_shards, values_of


def get_value(model: nn.Module, name: str) -> Tensor:
    """Return the value of a tensor of the model, evaluated as in evaluation mode; no state advances.

    >>> import torch, rewriter
    >>> spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
    >>> model = rewriter.rewrite(torch.nn.Sequential(torch.nn.Linear(3, 3)), spec)
    >>> weight = get_value(model, "0.weight")
    >>> torch.equal(weight, weight.mT)
    True

    Arguments:
        model: a rewritten model, or one that contains rewritten models.
        name: any of the tensor's names; of a tensor without parametrization too.

    Raises:
        PlanError: the model has no such tensor.
    """
    entry = _entry(model, name, "get_value")
    if entry.site is None:
        assert entry.tensor is not None
        return entry.tensor.detach()
    with torch.no_grad():
        values = values_of(entry.site, _read)
    member = values[entry.site.position(entry.owners[0][1])]
    # A chain may return the stored tensor itself, and a frozen site its cached value: callers must not write into them.
    return member.detach().clone()


def _read(site: Site) -> Sequence[Tensor]:
    value = site.read(*site.read_inputs())
    return [value] if len(site.spec.members) == 1 else list(value)


@torch.no_grad()
def set_value(model: nn.Module, name: str, value: Tensor) -> None:
    """Set the stored tensors so that the tensor called `name` has the given value.

    >>> import torch, rewriter
    >>> spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
    >>> model = rewriter.rewrite(torch.nn.Sequential(torch.nn.Linear(2, 2)), spec)
    >>> set_value(model, "0.weight", torch.eye(2))
    >>> get_value(model, "0.weight")
    tensor([[1., 0.],
            [0., 1.]])

    Arguments:
        model: a rewritten model, or one that contains rewritten models.
        name: any of the tensor's names.
        value: of the tensor's shape. Of a model that `fully_shard` sharded every process gives it, whole or as shards.

    Raises:
        PlanError: the model has no such tensor, or its chain cannot produce the value; nothing has changed then.
    """
    check_model(model, "set_value", programs=False, wrapped=True)
    reshard(model)
    entry = _entry(model, name, "set_value")
    if entry.site is None:
        assert entry.tensor is not None
        check_shape(name, tuple(entry.tensor.shape), value)
        entry.tensor.copy_(value if is_distributed(value) else as_shards(name, value, entry.tensor))
        return
    assign_value(entry.site, name, value)


def freeze(model: nn.Module, only: Sequence[str] | None = None) -> None:
    """Cache the values of computed tensors as they are now: no chain is evaluated, and none of its tensors is trained.

    >>> import torch, rewriter
    >>> spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
    >>> model = rewriter.rewrite(torch.nn.Sequential(torch.nn.Linear(3, 3)), spec)
    >>> freeze(model)
    >>> [parameter.requires_grad for parameter in model.parameters()]
    [True, False]

    The cached value follows `.to()`, `load_state_dict`, `set_value` and `invalidate`. Writes into the stored tensors
    show after `unfreeze`; other tensors in their place are evaluated at once. A second `freeze` changes nothing. Copies
    of the model are frozen too, with the values that their own tensors give. A model that `fully_shard` sharded caches
    nothing: each forward evaluates the chains as in evaluation mode, without gradients.

    Arguments:
        model: a rewritten model, or one that contains rewritten models.
        only: rule names and globs of tensor names.

    Raises:
        PlanError: a pattern of `only` matches nothing.
    """
    check_model(model, "freeze", programs=False, wrapped=True)
    reshard(model)
    sites = [site for site in _sites(model, only, "freeze") if site.trained_before is None]
    for site in sites:  # before any is frozen: sites of one rule may share their steps
        site.trained_before = {name: tensor.requires_grad for name, tensor in site.named_parameters()}
    for site in sites:
        site.requires_grad_(False)
        site.zero_grad()  # an optimizer would make a step with what is there
        site.policy.freeze(True)
        if not is_managed(site):
            site.policy.frozen_value(site, site.read_inputs())


def unfreeze(model: nn.Module, only: Sequence[str] | None = None) -> None:
    """Undo `freeze`: chains are evaluated again, and the parameters that were trained before are trained again.

    Arguments:
        model: a model with frozen sites.
        only: rule names and globs of tensor names.

    Raises:
        PlanError: a pattern of `only` matches nothing.
    """
    check_model(model, "unfreeze", programs=False, wrapped=True)
    reshard(model)
    for site in _sites(model, only, "unfreeze"):
        trained = site.trained_before or {}
        for name, tensor in site.named_parameters():
            tensor.requires_grad_(trained.get(name, tensor.requires_grad))
        site.trained_before = None
        site.policy.freeze(False)


def invalidate(model: nn.Module) -> None:
    """Drop every value that is cached across forwards, after a change that torch does not count.

    Cached values of rules with ``cache: version`` and of frozen sites follow in-place changes, swaps, conversions and
    loads of the tensors that they are computed from. Call this after a write through ``.data`` or through NumPy, and
    after a change inside a list or dict of a step: torch does not count those.
    """
    check_model(model, "invalidate", programs=False, wrapped=True)
    for site in model.modules():
        if isinstance(site, Site):
            site.policy.invalidate()


def _sites(model: nn.Module, only: Sequence[str] | None, verb: str) -> list[Site]:
    steps, sites = _chosen(_present(model), only)
    if not sites and not steps:
        warnings.warn(NOTHING_COMPUTED.format(verb), stacklevel=3)
    if steps:
        raise PlanError(
            f"{steps[0][1]!r} is the label of a step of {steps[0][0].spec.name}; a site is frozen as a whole"
        )
    return list(sites)


def _entry(model: nn.Module, name: str, verb: str) -> Entry:
    check_model(model, verb, programs=False, wrapped=True)
    entries = survey(model)
    for entry in entries:
        if name in entry.names:
            return entry
    names = [known for entry in entries for known in entry.names]
    raise PlanError(f"the model has no tensor called {name!r}{suggestion(name, names)}")
