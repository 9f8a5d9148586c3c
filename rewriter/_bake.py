"""bake: turn computed tensors back into plain ones."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rewriter._bake_steps import without_step
from rewriter._copy import copied
from rewriter._frozen import unfreeze_rest
from rewriter._fsdp import is_sharded, leave_fsdp, refuse_labels, refuse_offloaded, reshard, without_fsdp
from rewriter._given import Model, check_model
from rewriter._originals import NOTHING_COMPUTED, check_originals
from rewriter._remap import Following
from rewriter._undo import undone_on_failure
from rewriter.bindings import RewrittenModule, detach, refuse_replaced, release
from rewriter.bindings._late_changes import module_at
from rewriter.bindings._pretrained import refuse_saving
from rewriter.bindings.graph import lower_again, refuse_edited
from rewriter.errors import PlanError
from rewriter.language._glob import Glob
from rewriter.parametrizations._registry import suggestion
from rewriter.planning import Entry, refuse_strays, survey
from rewriter.sites import Site, refuse_mixed, site_path
from rewriter.sites._places import CONTEXTS
from rewriter.sites._shards import values_of

Keep = Literal["value", "original"]


@dataclass
class Baked:
    """One site on its way back: where it is, and the values that replace it."""

    site: Site
    entries: list[Entry]
    values: list[Tensor]


@torch.inference_mode(False)
@torch.no_grad()
def bake(
    model: Model,
    *,
    only: Sequence[str] | None = None,
    keep: Keep = "value",
    inplace: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Model:
    """Return the model with its parametrizations evaluated into plain tensors.

    >>> import torch, rewriter
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    >>> spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
    >>> plain = rewriter.bake(rewriter.rewrite(model, spec))
    >>> type(plain).__name__, list(plain.state_dict())
    ('Sequential', ['0.weight', '0.bias'])

    A model that `fully_shard` sharded comes back without FSDP, and its tensors stay shards (DTensors). Every process
    calls bake, and the tensors of one site are whole at a time.

    The class, names, order and kinds of tensors are those of the model that was rewritten. The values are the ones
    that a forward in evaluation mode uses; no state of a parametrization advances.

    Arguments:
        model: a rewritten model, or one that contains rewritten models.
        only: rule names, globs of tensor names, and labels of single steps; the rest stays parametrized.
        keep: ``"value"``, or ``"original"`` to put the stored tensors back and so undo the parametrization.
        inplace: without a copy.
        optimizer: over parameters of `model`; changed so that it trains the plain model, as with `rewrite`.

    Raises:
        PlanError: a pattern of `only` matches nothing, or a site keeps no tensor that could be put back; the model is
            as it was. Or torch.fx traced a rewritten model again, and `model` is what came of it.
    """
    check_model(model, "bake")
    if keep not in ("value", "original"):
        raise PlanError(f"keep is 'value' or 'original', not {keep!r}")
    following = Following(optimizer, model, "bake") if optimizer is not None else None
    if isinstance(model, ExportedProgram):
        from rewriter.program import bake_program

        return bake_program(model, only=only, keep=keep, inplace=inplace)  # type: ignore[return-value]
    refuse_mixed(model.modules())
    refuse_offloaded(model)
    plain = _bake_module(model, only, keep, inplace)
    if following is not None:
        following.follow(plain)
    return plain


def _bake_module(model: nn.Module, only: Sequence[str] | None, keep: Keep, inplace: bool) -> nn.Module:
    if not is_sharded(model):
        return _bake(model if inplace else _copy_of(model), only, keep)
    reshard(model)
    if not inplace:
        with without_fsdp(model):
            target = copied(model)
        return _bake(target, only, keep, shards=True)
    with undone_on_failure(model):
        leave_fsdp(model)
        return _bake(model, only, keep, shards=True)


def _copy_of(model: nn.Module) -> nn.Module:
    """Return a copy of which the frozen tensors have the values that they have in `model`."""
    copy = copied(model)
    for one, other in zip(model.modules(), copy.modules(), strict=True):
        if isinstance(one, Site) and one.policy.frozen:
            value = one.policy.frozen_value(one, one.read_inputs())
            other.policy.take_frozen(other, value)  # type: ignore[union-attr, operator]
    return copy


def _bake(target: nn.Module, only: Sequence[str] | None, keep: Keep, shards: bool = False) -> nn.Module:
    every = _present(target)
    rewritten = (isinstance(module, RewrittenModule) or CONTEXTS in module.__dict__ for module in target.modules())
    if not every and not any(rewritten):
        warnings.warn(NOTHING_COMPUTED.format("bake"), stacklevel=6)
    labels, chosen = _chosen(every, only)
    if shards:
        refuse_labels(labels)
    shorter = [without_step(site, label, keep) for site, label in labels]
    evaluate = functools.partial(_values, keep=keep)
    if shards:
        evaluate = functools.partial(values_of, evaluate=evaluate)
    baked = [Baked(site, entries, evaluate(site)) for site, entries in chosen.items()]
    graphs = [(path, module) for path, module in target.named_modules() if isinstance(module, RewrittenModule)]
    for _, module in graphs:
        refuse_edited(module)
        if len(chosen) < len(every):
            module.refuse_overridden()
        if module.was_graph:
            refuse_replaced(module)
    if len(chosen) == len(every):
        unfreeze_rest(target)
    uses = Counter(id(parameter) for module in target.modules() for parameter in module._parameters.values())
    for one in baked:
        _put_back(one, uses)
    for site in shorter:
        site.apply()
    for owner in list(target.modules()):
        if CONTEXTS in owner.__dict__ and not any(isinstance(child, Site) for child in owner.modules()):
            release(owner)
    plain = _plain_roots(target, graphs)
    refuse_saving(plain, [name for one in baked for entry in one.entries for name in entry.names])
    return plain


def _present(target: nn.Module) -> dict[Site, list[Entry]]:
    sites: dict[Site, list[Entry]] = {}
    for entry in survey(target):
        if entry.site is not None:
            sites.setdefault(entry.site, []).append(entry)
    refuse_strays(target, sites)
    _refuse_replaced_sources(target, sites)
    return sites


def _refuse_replaced_sources(model: nn.Module, sites: Iterable[Site]) -> None:
    """Refuse a model in which a module was replaced from whose tensors a chain computes: the chain has the old one."""
    reading = {site: site_path(site) for site in sites if site.spec.reads}
    for path, site in model.named_modules(remove_duplicate=False) if reading else ():
        if site not in reading or not f".{path}".endswith(f".{reading[site]}"):  # part of a model of its own
            continue
        for read, owner in site.reads_from():
            found = module_at(model, f"{path.removesuffix(reading[site])}{read.rpartition('.')[0]}".rstrip("."))
            if found is None or owner not in set(found.modules()):
                raise PlanError(
                    f"{site.spec.name} is computed from {read}, whose module was replaced or removed after the model "
                    "was rewritten: put the module back, or bake the model before, change it and rewrite it again"
                )


def _chosen(
    every: Mapping[Site, list[Entry]], only: Sequence[str] | None
) -> tuple[list[tuple[Site, str]], dict[Site, list[Entry]]]:
    """Return the labelled steps and the whole sites that `only` names; all sites where it names none."""
    if only is None:
        return [], dict(every)
    chosen: dict[Site, list[Entry]] = {}
    labelled: dict[Site, str] = {}
    for pattern in [only] if isinstance(only, str) else only:
        matches = Glob(pattern).matches
        found = {
            site: entries
            for site, entries in every.items()
            if site.spec.rule == pattern or any(matches(name) for entry in entries for name in entry.names)
        }
        steps = [site for site in every if pattern in site.spec.labels and site not in found]
        for site in steps:
            if len(site.spec.chain) == 1:
                found[site] = every[site]
            elif site in labelled:
                raise PlanError(f"{site.spec.name}: take out one labelled step at a time")
            else:
                labelled[site] = pattern
        if not found and not steps:
            rules = sorted({site.spec.rule for site in every})
            names = [name for entries in every.values() for entry in entries for name in entry.names]
            labels = [label for site in every for label in site.spec.labels if label]
            raise PlanError(
                f"{pattern!r} is neither a rule or label of the model nor matches a parametrized tensor; "
                f"its rules are {', '.join(map(repr, rules)) or 'none'}"
                + suggestion(pattern, [*rules, *labels, *names[:5000]])
            )
        chosen.update(found)
    return [(site, label) for site, label in labelled.items() if site not in chosen], chosen


def _values(site: Site, keep: Keep) -> list[Tensor]:
    """The values for the site's members, which may be the stored tensors themselves."""
    if keep == "original":
        return _originals(site)
    value, drawn = site.read_and_drawn(*site.read_inputs())
    if drawn:
        warnings.warn(
            f"{site.spec.name}: {' >> '.join(site.spec.chain)} draws random numbers in evaluation mode, and the "
            "baked tensor is one draw",
            stacklevel=8,
        )
    return [value] if len(site.spec.members) == 1 else list(value)


def _originals(site: Site) -> list[Tensor]:
    record, originals = site.spec, site.originals
    if record.layout.only and record.outer and len(originals) == 2:
        originals = [record.layout.join(*originals)]
    check_originals(record.name, record.chain, originals, record.members)
    return originals


def _plain_tensors(baked: Baked, uses: Mapping[int, int]) -> list[Tensor]:
    """Make the parameters and buffers: the Parameter objects that are stored, where their form allows it.

    One that the model has in a second place is not reused, unless it is the value: the other place keeps it.
    """
    site = baked.site
    free = [
        original
        for original in site.originals
        if isinstance(original, nn.Parameter)
        and (uses[id(original)] == 1 or any(original is value for value in baked.values))
    ]
    plain: list[Tensor] = []
    for member, value in zip(site.spec.members, (value.detach() for value in baked.values), strict=True):
        if member.kind == "buffer":
            plain.append(value.clone(memory_format=torch.contiguous_format))
            continue
        trained = _trained(site, member.requires_grad)
        reused = next((index for index, original in enumerate(free) if _same_form(original, value)), None)
        if reused is None:
            plain.append(nn.Parameter(value.clone(memory_format=torch.contiguous_format), requires_grad=trained))
        else:
            original = free.pop(reused)
            original.data.copy_(value.clone())  # which may be a view of the original
            plain.append(original.requires_grad_(trained))
    return plain


def _same_form(original: Tensor, value: Tensor) -> bool:
    same = (original.shape, original.dtype, original.device) == (value.shape, value.dtype, value.device)
    same = same and type(original.detach()) is type(value)
    return same and (original.is_contiguous() or original.is_contiguous(memory_format=torch.channels_last))


def _trained(site: Site, before: bool) -> bool:
    frozen = any(getattr(step, "freezes_original", False) for step in site.steps)
    if frozen or site.spec.trainable is not None or not site.originals:
        return before
    if site.trained_before is not None:
        return any(site.trained_before[name] for name in site.original_names)
    return any(original.requires_grad for original in site.originals)


def _put_back(baked: Baked, uses: Mapping[int, int]) -> None:
    places: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}
    for entry, value in zip(baked.entries, _plain_tensors(baked, uses), strict=True):
        for owner, tensor in entry.owners:
            places.setdefault(id(owner), (owner, {}))[1][tensor] = value
    for owner, values in places.values():
        groups: Iterable[dict[str, Tensor]] = [values]
        if len(baked.entries) == 1:
            groups = [{tensor: value} for tensor, value in values.items()]
        for group in groups:
            detach(owner, group)


def _plain_roots(target: nn.Module, graphs: Sequence[tuple[str, RewrittenModule]]) -> nn.Module:
    """Give every rewritten model that holds no site any more its own class back."""
    for path, module in reversed(graphs):
        if module.sites:
            if module.without is not None:
                lower_again(module)
            continue
        plain = module.restored()
        if not path:
            return plain
        parent, _, name = path.rpartition(".")
        target.get_submodule(parent)._modules[name] = plain
    return target
