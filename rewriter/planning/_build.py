"""From a claim to a Site, and the check of its value."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rewriter._given import is_distributed, kind_of
from rewriter.context import Contexts
from rewriter.context._fingerprint import PLAIN, settings_of
from rewriter.language import Rule
from rewriter.planning._chain import BuildError, Chain, check_arity, first_line, layout_of_claim, value_of
from rewriter.planning._fit import Fitted, sums_to_a_number
from rewriter.planning._resolve import Claim
from rewriter.planning._survey import Entry, dtype_name
from rewriter.sites import Layout, Member, Site, SiteSpec
from rewriter.sites._gathered import distributed_from_first
from rewriter.sites._inverse import Inverse

Description = tuple[tuple[str, ...], str]
"""Chain and options as a record has them."""


def describe(rule: Rule) -> Description:
    """Return the chain and the options of a rule as the records of its sites print them; nothing is built."""
    options = {
        "cache": rule.cache,
        "per": rule.per,
        "reshape": rule.reshape,
        "from": rule.source,
        "joint": rule.joint,
        "inputs": tuple(step.inputs for step in rule.chain),
        "batch": rule.batch,
        "memory": rule.memory,
        "share": rule.share,
        "trainable": rule.trainable,
        "settings": tuple("" if step.module is None else _settings(step.module) for step in rule.chain),
    }
    steps = len(rule.chain)
    defaults = ("forward", None, None, None, (), ((),) * steps, "auto", "keep", False, None, ("",) * steps)
    shown = [f"{key}={value}" for (key, value), usual in zip(options.items(), defaults, strict=True) if value != usual]
    return tuple(str(step) for step in rule.chain), ", ".join(shown)


_OPTION = re.compile(r"(?:^|, )(cache|per|reshape|from|joint|inputs|batch|memory|share|trainable)=")


def options_with(record: SiteSpec, rule: Rule) -> str:
    """Return the options of a site to whose chain the steps of `rule` are appended, as `describe` prints them."""
    shown, _, settings = record.options.partition("settings=")
    _, *found = _OPTION.split(shown.rstrip(", "))
    options = dict(zip(found[::2], found[1::2], strict=True))
    if "inputs" in options:
        options["inputs"] = str((*record.inputs, *(step.inputs for step in rule.chain)))
    given = ast.literal_eval(settings) if settings else ("",) * len(record.chain)
    given += tuple("" if step.module is None else _settings(step.module) for step in rule.chain)
    if any(given):
        options["settings"] = str(given)
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _settings(module: nn.Module) -> str:
    """Print the plain attributes of a module given from Python: two modules of one class may differ in them."""
    found = [
        (f"{path}.{key}" if path else key, value)
        for path, part in module.named_modules()
        for key, value in settings_of(part).items()
        if not key.startswith("_") and _is_plain(value)
    ]
    return ", ".join(f"{key}={value}" for key, value in found)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.Size))


def build(
    claim: Claim,
    description: Description,
    contexts: Contexts,
    *,
    chain: Chain | None = None,
    fitted: Fitted | None = None,
) -> Site:
    """Construct the site of `claim` from the values that its tensors have now; the model is only read.

    The caller turns gradients off once for all sites.

    Arguments:
        claim: the rule and the tensors.
        description: of the rule.
        contexts: of the site until it is attached.
        chain: the chain, which may be constructed in part already.
        fitted: instead of a chain: a step and originals that were computed together with those of other sites.

    Raises:
        BuildError: a step cannot be constructed or inverted, or the chain takes other tensors than there are.
    """
    rule = claim.rule
    layout = layout_of_claim(claim)
    if fitted is not None:
        steps = fitted.steps
        check_arity(steps[0], rule.chain[0], len(fitted.originals))
        originals, stored, carries = Inverse(fitted.originals, (len(fitted.originals),), (0,))
    else:
        assert chain is not None
        if rule.init == "keep":
            _require_numbers(claim)
        originals, stored, carries = chain.finish()
        steps = chain.steps
    outer = not layout.plain and len(originals) == 1 and tuple(originals[0].shape) == layout.inner
    if outer:
        originals = [layout.part.outward(originals[0])]
    gather = chain is not None and chain.like is not None
    if chain is not None and gather:
        originals = [distributed_from_first(original, chain.like) for original in originals]
    elif is_distributed(value_of(claim.entries[0])) and not all(map(is_distributed, originals)):
        raise BuildError("its steps give originals that are not distributed")
    printed, options = description
    record = SiteSpec(
        members=tuple(_member(entry) for entry in claim.entries),
        rule=rule.name,
        chain=printed,
        labels=tuple(step.label for step in rule.chain),
        options=options,
        cache=rule.cache,
        stored=stored,
        carries=carries,
        inputs=tuple(step.inputs for step in rule.chain),
        source=rule.source,
        layout=layout,
        outer=outer,
        batch="never" if gather else rule.batch,
        memory=rule.memory,
        trainable=rule.trainable,
        gather=gather,
        listed=chain is not None and chain.listed,
    )
    tensors = _stored_tensors(claim, steps, originals)
    if layout.only:
        tensors.append(_rest(claim.entries[0], layout))
    site = Site(steps, tensors, record, contexts)
    training = claim.entries[0].owners[0][0].training
    if any(module.training is not training for module in site.modules()):
        site.train(training)
    if chain is not None and chain.refits:
        chain.refit(site)
    return site


def _member(entry: Entry) -> Member:
    info = entry.infos[0]
    return Member(entry.names, info.kind, info.shape, info.dtype, entry.persistent, info.requires_grad)


def _require_numbers(claim: Claim) -> None:
    """Refuse a weight with NaN or infinite entries: one of them can spoil the whole value of a chain."""
    for entry in claim.entries:
        value = value_of(entry)
        if entry.infos[0].kind == "buffer" or type(value) not in PLAIN or value.is_meta or not value.numel():
            continue
        if value.is_complex():
            value = torch.view_as_real(value.resolve_conj())
        elif not value.is_floating_point():
            continue
        numbers = value.detach().float() if value.itemsize < 2 else value.detach()  # eight bits have no such operators
        if sums_to_a_number(numbers):  # a sum can also overflow by itself
            continue
        broken = int((~numbers.isfinite()).sum())
        if broken:
            raise BuildError(
                f"{entry.name} has {broken} of {value.numel()} entries that are NaN or infinite; repair it, leave it "
                "out with `except`, or store it as it is with `init: raw`"
            )


def _stored_tensors(claim: Claim, steps: Sequence[nn.Module], originals: Sequence[Tensor]) -> list[Tensor]:
    first = claim.entries[0].infos[0]
    trained = any(entry.infos[0].requires_grad for entry in claim.entries)
    trainable = claim.rule.trainable
    frozen = any(getattr(step, "freezes_original", False) for step in steps)
    if trainable is False or (trainable is None and not trained and not frozen):
        # The parameters of an adapter are trained although the tensor is frozen.
        for step in steps:
            step.requires_grad_(False)
    trained = trained if trainable is None else trainable
    if first.kind == "buffer" or not all(
        original.is_floating_point() or original.is_complex() for original in originals
    ):
        if trainable:
            raise BuildError(
                f"`trainable: true` needs a floating-point parameter, and this is a {first.kind} of {first.dtype}"
            )
        return [nn.Parameter(o, requires_grad=False) if first.kind == "parameter" else o for o in originals]
    return [nn.Parameter(original, requires_grad=trained and not frozen) for original in originals]


def _rest(entry: Entry, layout: Layout) -> Tensor:
    """Return the chunks that no chain computes, trained as the tensor was."""
    rest, info = layout.rest(value_of(entry)).contiguous(), entry.infos[0]
    return nn.Parameter(rest, requires_grad=info.requires_grad) if info.kind == "parameter" else rest


class Measures(NamedTuple):
    """What a plan says of a value; ``None`` where that has no meaning.

    Arguments:
        moved: how far it is from the tensor before, relative to the norm of that.
        zeros: which part of its entries is zero.
    """

    moved: float | None = None
    zeros: float | None = None


def check_value(claim: Claim, site: Site, inputs: Mapping[str, Tensor], *, measure: bool) -> Measures:
    """Check the value of a chain, and measure it.

    Arguments:
        measure: whether to measure; otherwise only shape and dtype are looked at.

    Raises:
        BuildError: the chain fails, or gives another shape or dtype and the rule is not `unsafe`.
    """
    given = [*site.originals, *(inputs[name] for name in site.spec.reads)]
    versions = [tensor._version for tensor in given if not tensor.is_inference()]
    try:
        with torch.no_grad():
            value = site.settled().evaluate(*[inputs[name] for name in site.spec.reads])
    except Exception as problem:
        raise BuildError(f"evaluating the chain fails: {first_line(problem)}") from problem
    if versions != [tensor._version for tensor in given if not tensor.is_inference()]:
        raise BuildError("the chain changes the tensor that it is given in place; it has to return a new one")
    results = [value] if len(claim.entries) == 1 else list(value)
    moved: float | None = 0.0
    zeros = count = 0
    for entry, result in zip(claim.entries, results, strict=True):
        before = value_of(entry)
        if not isinstance(result, Tensor):
            raise BuildError(f"the chain gives {kind_of(result)}, not a tensor")
        if (result.shape, result.dtype) != (before.shape, before.dtype):
            if not claim.rule.unsafe:
                raise BuildError(
                    f"the chain gives {dtype_name(result.dtype)}{list(result.shape)} where the model has "
                    f"{dtype_name(before.dtype)}{list(before.shape)}; if that is meant, say `unsafe: true`"
                )
            moved = None
        elif before.is_meta or not measure:
            moved = None
        elif moved is not None:
            moved = max(moved, _distance(result, before))
        if measure and not result.is_meta:
            zeros, count = zeros + result.numel() - int(result.count_nonzero()), count + result.numel()
    return Measures(moved, zeros / count if count else None)


def _distance(after: Tensor, before: Tensor) -> float:
    kind = torch.complex128 if before.is_complex() else torch.float64
    exact = before.detach().to(kind)
    norm = float(exact.norm())
    difference = float((after.detach().to(kind) - exact).norm())
    return difference / norm if norm else difference
