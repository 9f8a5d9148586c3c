"""From a claim to a ParametrizedTensor: constructing the steps and running their right inverses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter._given import kind_of
from rewriter.context import Session
from rewriter.context._fingerprint import PLAIN, settings_of
from rewriter.language import Rule, Step
from rewriter.planning._construct import (
    BuildError,
    Extra,
    construct_steps,
    first_line,
    layout_of_claim,
    transposed,
    value_of,
)
from rewriter.planning._fit import Fitted, sums_to_a_number
from rewriter.planning._resolve import Claim
from rewriter.planning._survey import Entry, dtype_name
from rewriter.sites import Layout, Member, ParametrizedTensor, Record
from rewriter.sites._inverse import Inverse, invert_chain, parts_of, right_inverse

Description = tuple[tuple[str, ...], str]
"""Chain and options as a record has them."""


def describe(rule: Rule) -> Description:
    """Return what the records of a rule's sites say of it, without building anything."""
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
        "settings": tuple(_settings(step.module) for step in rule.chain),
    }
    steps = len(rule.chain)
    defaults = ("forward", None, None, None, (), ((),) * steps, "auto", "keep", False, ("",) * steps)
    shown = [f"{key}={value}" for (key, value), usual in zip(options.items(), defaults, strict=True) if value != usual]
    return tuple(str(step) for step in rule.chain), ", ".join(shown)


def _settings(module: nn.Module | None) -> str:
    """Print the plain values that a module given from Python holds: its name alone does not tell two of them apart."""
    if module is None:
        return ""
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
    inputs: Mapping[str, Tensor],
    description: Description,
    session: Session,
    shared: Sequence[nn.Module] | None = None,
    extra: Extra | None = None,
    fitted: Fitted | None = None,
) -> ParametrizedTensor:
    """Construct the site of `claim` from the values its tensors have now; the model is only read.

    It is called without gradients, which entering for each site again would take time.

    Arguments:
        claim: the rule and the tensors.
        inputs: values of the further tensors that the chain reads, by name.
        description: of the rule.
        session: what the site belongs to until it is attached.
        shared: steps to use instead of new ones (`share: true`).
        extra: constructor arguments decided over all sites of the rule.
        fitted: what was constructed and fitted together with other sites.

    Raises:
        BuildError: a step cannot be constructed or inverted, or the chain takes other tensors than there are.
    """
    rule = claim.rule
    values = [value_of(entry) for entry in claim.entries]
    layout = layout_of_claim(claim)
    if len(values) > 1 and not layout.plain:
        raise BuildError("`joint` cannot be combined with `per` or `reshape`")
    target: Any = values[0] if len(values) == 1 else tuple(values)
    if rule.init == "keep" and fitted is None:
        _require_numbers(claim, values)
    if fitted is not None:
        steps = fitted.steps
        _check_arity(steps[0], rule.chain[0], len(fitted.originals))
        originals, stored, carries = Inverse(fitted.originals, (len(fitted.originals),), (0,))
    else:
        made = None if shared is None else list(shared)
        steps = made or construct_steps(rule, layout, target, inputs, extra or {}, transposed=transposed(claim))[0]
        if rule.init == "sample":
            target = _sample(steps, layout)
        originals, stored, carries = _invert(rule, layout, steps, target, inputs)
    outer = not layout.plain and len(originals) == 1 and tuple(originals[0].shape) == layout.inner
    if outer:
        originals = [layout.outward(originals[0])]
    chain, options = description
    record = Record(
        members=tuple(_member(entry) for entry in claim.entries),
        rule=rule.name,
        chain=chain,
        labels=tuple(step.label for step in rule.chain),
        options=options,
        cache=rule.cache,
        stored=stored,
        carries=carries,
        inputs=tuple(step.inputs for step in rule.chain),
        source=rule.source,
        layout=layout,
        outer=outer,
        batch=rule.batch,
        memory=rule.memory,
    )
    site = ParametrizedTensor(steps, _stored_tensors(claim, steps, originals), record, session)
    if not claim.entries[0].owners[0][0].training:
        site.eval()
    return site


def _member(entry: Entry) -> Member:
    info = entry.infos[0]
    return Member(entry.names, info.kind, info.shape, info.dtype, entry.persistent, info.requires_grad)


def _require_numbers(claim: Claim, values: Sequence[Tensor]) -> None:
    """Refuse a weight that training or a damaged file has broken: one entry can spoil all that a chain computes."""
    for entry, value in zip(claim.entries, values, strict=True):
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


def _sample(steps: Sequence[nn.Module], layout: Layout) -> Any:
    """Draw a value: from the last step that can draw one, mapped through the steps after it."""
    for index in reversed(range(len(steps))):
        draw: Any = getattr(steps[index], "sample", None)
        if draw is not None:
            value = draw()
            for step in steps[index + 1 :]:
                value = step(value)
            return value if layout.plain else layout.outward(value)
    raise BuildError("`init: sample` needs a step that can draw from its space, and none of the chain can")


def _invert(
    rule: Rule, layout: Layout, steps: Sequence[nn.Module], target: Any, inputs: Mapping[str, Tensor]
) -> Inverse:
    """Find the stored tensors: through the right inverses, or as they are for ``init: raw``."""
    further = [[inputs[name] for name in step.inputs] for step in rule.chain]

    def inverse_of(index: int, value: Any) -> Any:
        try:
            found = value if rule.init == "raw" else right_inverse(steps[index], value, further[index])
        except Exception as problem:
            raise BuildError(
                f"step {index + 1}, {rule.chain[index]}: its right inverse fails on the tensor: {first_line(problem)}"
                " (with `init: raw` the tensor is stored as it is)"
            ) from problem
        _check_arity(steps[index], rule.chain[index], len(parts_of(found)) + len(further[index]))
        return found

    value = target if layout.plain else layout.inward(target)
    found = invert_chain(steps, value, further, from_source=rule.source is not None, inverse_of=inverse_of)
    # The model's own tensors come through unchanged where a step has no right inverse: never store those.
    return found._replace(
        originals=[original.clone(memory_format=torch.contiguous_format) for original in found.originals]
    )


def _check_arity(step: nn.Module, named: Step, given: int) -> None:
    forward = type(step).forward
    if not _takes(forward, given):
        raise BuildError(
            f"{named}: its forward takes {inspect.signature(forward)}, and the chain gives it {given} tensors"
            " (several stored tensors come from a right_inverse that returns them, further ones from `inputs`)"
        )


@functools.lru_cache(maxsize=1024)
def _takes(forward: Any, given: int) -> bool:
    try:
        inspect.signature(forward).bind(None, *range(given))
    except TypeError:
        return False
    return True


def _stored_tensors(claim: Claim, steps: Sequence[nn.Module], originals: Sequence[Tensor]) -> list[Tensor]:
    first = claim.entries[0].infos[0]
    trained = any(entry.infos[0].requires_grad for entry in claim.entries)
    frozen = any(getattr(step, "freezes_original", False) for step in steps)
    if not trained and not frozen:
        # What adapts a frozen base is there to be trained.
        for step in steps:
            step.requires_grad_(False)
    if first.kind == "buffer" or not all(
        original.is_floating_point() or original.is_complex() for original in originals
    ):
        return [nn.Parameter(o, requires_grad=False) if first.kind == "parameter" else o for o in originals]
    return [nn.Parameter(original, requires_grad=trained and not frozen) for original in originals]


def check_value(claim: Claim, site: ParametrizedTensor, inputs: Mapping[str, Tensor], *, measure: bool) -> float | None:
    """Return how far the chain moves the tensor, relative to its norm; ``None`` where that has no meaning.

    Arguments:
        measure: whether to find the distance; otherwise only shape and dtype are looked at.

    Raises:
        BuildError: the chain fails, or gives another shape or dtype and the rule is not `unsafe`.
    """
    given = [*site.originals, *(inputs[name] for name in site.record.reads)]
    versions = [tensor._version for tensor in given if not tensor.is_inference()]
    try:
        with torch.no_grad():
            value = site.settled().evaluate(*[inputs[name] for name in site.record.reads])
    except Exception as problem:
        raise BuildError(f"evaluating the chain fails: {first_line(problem)}") from problem
    if versions != [tensor._version for tensor in given if not tensor.is_inference()]:
        raise BuildError("the chain changes the tensor that it is given in place; it has to return a new one")
    results = [value] if len(claim.entries) == 1 else list(value)
    moved: float | None = 0.0
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
    return moved


def _distance(after: Tensor, before: Tensor) -> float:
    kind = torch.complex128 if before.is_complex() else torch.float64
    exact = before.detach().to(kind)
    norm = float(exact.norm())
    difference = float((after.detach().to(kind) - exact).norm())
    return difference / norm if norm else difference
