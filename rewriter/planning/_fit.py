"""Right inverses of many equal chains, run as one: thousands of small factorizations cost their calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rewriter.context._fingerprint import same_setting, settings_of, snapshot
from rewriter.context._random import nothing_drawn
from rewriter.language import Rule
from rewriter.planning._construct import BuildError, construct_steps, layout_of_claim, transposed, value_of
from rewriter.planning._resolve import Claim
from rewriter.sites._batch import likeness_of_step, stacked_step
from rewriter.sites._inverse import parts_of, right_inverse

FEWEST = 16
LARGEST = 64 * 64
PROBES = 4
"""How many tensors are also fitted alone, to see that it comes to the same."""


class Fitted(NamedTuple):
    """A chain of one step, constructed and fitted to a tensor.

    Arguments:
        steps: the step.
        originals: the stored tensors from which it computes the tensor.
    """

    steps: list[nn.Module]
    originals: list[Tensor]


class _Member(NamedTuple):
    claim: Claim
    step: nn.Module
    value: Tensor


def fitted_together(rule: Rule, claims: Sequence[Claim]) -> dict[int, Fitted]:
    """Construct and fit the chains of a rule's claims that can be fitted as one, by the `id` of the claim.

    What cannot, for whatever reason, is missing from the result, and is to be fitted by itself: there it will say
    what is wrong with it.

    Arguments:
        rule: the rule.
        claims: its claims, in the order in which their steps are to be constructed.
    """
    if len(claims) < FEWEST or not _can_stack(rule):
        return {}
    drawn = torch.get_rng_state()
    groups: dict[object, list[_Member]] = {}
    for claim in claims:
        value = value_of(claim.entries[0])
        if value.is_meta or value.numel() > LARGEST or type(value) is not Tensor or value.layout != torch.strided:
            continue
        try:
            (step,) = construct_steps(rule, layout_of_claim(claim), value, {}, {}, transposed=transposed(claim))[0]
        except BuildError:
            break
        form = (value.shape, value.dtype, value.device, likeness_of_step(step))
        groups.setdefault(form, []).append(_Member(claim, step, value))
    found: dict[int, Fitted] = {}
    for group in groups.values():
        if len(group) >= FEWEST:
            found.update(_fitted(rule, group))
    if not found:  # the constructors will draw again
        torch.set_rng_state(drawn)
    return found


def sums_to_a_number(tensor: Tensor) -> bool:
    """Whether the sum of all entries is finite: one that is NaN or infinite would break it."""
    total = tensor.detach().sum().item()
    return math.isfinite(abs(total))


def _can_stack(rule: Rule) -> bool:
    if len(rule.chain) != 1 or rule.init != "keep" or rule.share or rule.joint or rule.source is not None:
        return False
    (step,) = rule.chain
    factory: Any = step.factory
    return (
        rule.per is None
        and rule.reshape is None
        and not step.inputs
        and isinstance(factory, type)
        and not any(getattr(factory, name, False) for name in ("stateful", "random", "plan_sites"))
        and hasattr(factory, "right_inverse")
    )


def _fitted(rule: Rule, group: Sequence[_Member]) -> Mapping[int, Fitted]:
    steps = [member.step for member in group]
    value = torch.stack([member.value for member in group])
    if not sums_to_a_number(value):
        return {}
    try:
        with nothing_drawn([value]):
            whole, parts = _all_at_once(steps, value)
            if any(type(part) is not Tensor or part.shape[:1] != value.shape[:1] for part in parts):
                return {}
            for index in range(0, len(group), -(-len(group) // PROBES)):
                if not _same_alone(rule, group[index].claim, whole, [part[index] for part in parts], index):
                    return {}
    except Exception:  # each by itself shows which one it is
        return {}
    for kind, name, tensor in _tensors_of(whole):
        for step, part in zip(steps, tensor.unbind(0), strict=True):
            own = step.__dict__[kind][name]
            own.copy_(part.reshape(own.shape))
    # Memory of its own for each: a tensor is saved with all the memory that it lies in.
    rows = zip(*(part.unbind(0) for part in parts), strict=True)
    return {
        id(member.claim): Fitted([member.step], [part.clone(memory_format=torch.contiguous_format) for part in row])
        for member, row in zip(group, rows, strict=True)
    }


def _all_at_once(steps: Sequence[nn.Module], value: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """Run one right inverse on all tensors.

    Returns:
        The step that did it, with what it left in its buffers for all of them, and the stored tensors.
    """
    first = steps[0]
    shape = tuple(value.shape[1:])
    if getattr(first, "batched", False):
        whole = stacked_step(steps, value.ndim)
        whole = _copied(whole) if whole is first else whole
        for name, setting in settings_of(whole).items():
            if isinstance(setting, tuple) and setting == shape:
                whole.__dict__[name] = type(setting)(value.shape)
        run: Callable[[Tensor], Any] = functools.partial(right_inverse, whole)
    else:
        if any(True for _ in _tensors_of(first)):
            raise NotImplementedError("a state that is not stacked")
        whole = _copied(first)
        run = torch.vmap(functools.partial(right_inverse, whole))
    before = {name: snapshot(setting) for name, setting in settings_of(whole).items()}
    parts = parts_of(run(value))
    after = settings_of(whole)
    if whole._modules or after.keys() != before.keys() or not all(map(same_setting, after.values(), before.values())):
        raise NotImplementedError("a state outside of buffers")
    return whole, parts


def _copied(module: nn.Module) -> nn.Module:
    copy: nn.Module = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    return copy


def _same_alone(rule: Rule, claim: Claim, whole: nn.Module, found: Sequence[Tensor], index: int) -> bool:
    """Whether a step that is fitted alone comes to the same stored tensors and the same state."""
    value = value_of(claim.entries[0])
    (step,) = construct_steps(rule, layout_of_claim(claim), value, {}, {}, transposed=transposed(claim))[0]
    alone = parts_of(right_inverse(step, value))
    if len(alone) != len(found) or not all(map(_close, found, alone)):
        return False
    return all(
        _close(whole.__dict__[kind][name][index].reshape(tensor.shape), tensor)
        for kind, name, tensor in _tensors_of(step)
    )


def _tensors_of(step: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for kind in ("_parameters", "_buffers"):
        for name, tensor in step.__dict__[kind].items():
            if tensor is not None:
                yield kind, name, tensor


def _close(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    rounding = 1e2 * torch.finfo(one.dtype).eps if one.is_floating_point() or one.is_complex() else 0.0
    return torch.allclose(one, other, rounding, rounding)
