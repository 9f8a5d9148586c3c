"""Right inverses of many equal chains, run as one: thousands of small factorizations cost their calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rewriter.planning._construct import BuildError, construct_steps, layout_of_claim, value_of
from rewriter.planning._resolve import Claim
from rewriter.runtime._batch import likeness_of_step, stacked_step
from rewriter.runtime._inverse import right_inverse
from rewriter.runtime._signature import same_setting, settings_of
from rewriter.spec import Rule

FEWEST = 16
LARGEST = 64 * 64
PROBES = 4
"""How many tensors are also fitted alone, to see that it comes to the same."""


class Fitted(NamedTuple):
    """A chain of one step, constructed and fitted to a tensor.

    Arguments:
        steps: the step.
        original: the stored tensor from which it computes the tensor.
    """

    steps: list[nn.Module]
    original: Tensor


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
    groups: dict[object, list[tuple[Claim, nn.Module]]] = {}
    for claim in claims:
        value = value_of(claim.entries[0])
        if value.is_meta or value.numel() > LARGEST or type(value) is not Tensor or value.layout != torch.strided:
            continue
        try:
            (step,) = construct_steps(rule, layout_of_claim(claim), value, {}, {})[0]
        except BuildError:
            break
        form = (value.shape, value.dtype, value.device, likeness_of_step(step))
        groups.setdefault(form, []).append((claim, step))
    found: dict[int, Fitted] = {}
    for group in groups.values():
        if len(group) >= FEWEST:
            found.update(_fitted(rule, group))
    if not found:  # the constructors will draw again
        torch.set_rng_state(drawn)
    return found


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
        and bool(getattr(factory, "batched", False))
        and not any(getattr(factory, name, False) for name in ("stateful", "random", "plan_sites"))
        and hasattr(factory, "right_inverse")
    )


def _fitted(rule: Rule, group: Sequence[tuple[Claim, nn.Module]]) -> Mapping[int, Fitted]:
    values = [value_of(claim.entries[0]) for claim, _ in group]
    steps = [step for _, step in group]
    value = torch.stack(values)
    whole = stacked_step(steps, value.ndim)
    if whole is steps[0]:  # it holds no tensors, and is not to be touched
        whole = _copied(whole)
    for name, setting in settings_of(whole).items():
        if isinstance(setting, tuple) and setting == tuple(values[0].shape):
            whole.__dict__[name] = type(setting)(value.shape)
    settings = settings_of(whole)
    try:
        with torch.random.fork_rng(devices=[]):
            originals = right_inverse(whole, value)
            if not _plain(originals, value) or not _unchanged(whole, settings):
                return {}
            for index in range(0, len(group), -(-len(group) // PROBES)):
                if not _same_alone(rule, group[index][0], whole, originals[index], index):
                    return {}
    except Exception:  # each by itself shows which one it is
        return {}
    for kind, name, tensor in _tensors_of(whole):
        for step, part in zip(steps, tensor.unbind(0), strict=True):
            own = step.__dict__[kind][name]
            own.copy_(part.reshape(own.shape))
    # Memory of its own for each: a tensor is saved with all the memory that it lies in.
    return {
        id(claim): Fitted([step], part.clone(memory_format=torch.contiguous_format))
        for (claim, step), part in zip(group, originals.unbind(0), strict=True)
    }


def _copied(module: nn.Module) -> nn.Module:
    copy: nn.Module = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    return copy


def _plain(originals: Any, value: Tensor) -> bool:
    # A tuple would be several stored tensors.
    return type(originals) is Tensor and originals.shape[:1] == value.shape[:1]


def _unchanged(module: nn.Module, before: Mapping[str, Any]) -> bool:
    """Whether fitting wrote to nothing but tensors."""
    after = settings_of(module)
    return (
        not module._modules
        and after.keys() == before.keys()
        and all(same_setting(after[name], before[name]) for name in before)
    )


def _same_alone(rule: Rule, claim: Claim, whole: nn.Module, original: Tensor, index: int) -> bool:
    """Whether a step that is fitted alone comes to the same stored tensor and the same state."""
    value = value_of(claim.entries[0])
    (step,) = construct_steps(rule, layout_of_claim(claim), value, {}, {})[0]
    alone = right_inverse(step, value)
    if type(alone) is not Tensor or not _close(original, alone):
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
