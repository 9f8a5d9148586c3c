"""Baking labelled steps: a chain loses one step, and its other steps take over the value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from rewriter.errors import PlanError
from rewriter.sites import Site, invert_chain
from rewriter.sites._assemble import reassemble
from rewriter.sites._steps import apply_chain


@dataclass
class Shorter:
    """A site without one of its steps, worked out aside; `apply` puts it in place.

    Arguments:
        site: the site as it is.
        kept: indices of the steps that stay.
        originals: what they start from.
        stored: how many of them each step reads.
        carries: which of its arguments each step gets from the one before.
    """

    site: Site
    kept: list[int]
    originals: list[Tensor]
    stored: tuple[int, ...]
    carries: tuple[int, ...]

    def apply(self) -> None:
        """Take the step out of the site."""
        site, record = self.site, self.site.spec
        steps = [site.steps[index] for index in self.kept]
        trained = any(original.requires_grad for original in site.originals)
        free = [original for original in site.originals if isinstance(original, nn.Parameter)]
        originals = [_parameter(original, free, trained) for original in self.originals]
        if any(map(_freezes, site.steps)) and not any(map(_freezes, steps)) and site.trained_before is None:
            trained = record.members[0].requires_grad if record.trainable is None else record.trainable
            for original in originals:
                original.requires_grad_(trained)
        shorter = replace(
            record,
            chain=tuple(record.chain[index] for index in self.kept),
            labels=tuple(record.labels[index] for index in self.kept),
            inputs=tuple(record.inputs[index] for index in self.kept),
            stored=self.stored,
            carries=self.carries,
        )
        reassemble(site, steps, originals, shorter)


def _freezes(step: nn.Module) -> bool:
    return bool(getattr(step, "freezes_original", False))


def _parameter(original: Tensor, free: list[nn.Parameter], trained: bool) -> nn.Parameter:
    """Use one of the Parameter objects that are there, so that an optimizer's reference stays good."""
    for index, parameter in enumerate(free):
        if (parameter.shape, parameter.dtype, parameter.device) == (original.shape, original.dtype, original.device):
            del free[index]
            parameter.data.copy_(original)
            return parameter
    return nn.Parameter(original, requires_grad=trained)


def without_step(site: Site, label: str, keep: Literal["value", "original"]) -> Shorter:
    """Work out the site without its step called `label`.

    Arguments:
        site: a site of one tensor, with at least one other step.
        label: the step's label.
        keep: ``"value"`` to keep what the site computes, ``"original"`` to compute what the other steps alone give.

    Raises:
        PlanError: the step takes or stores several tensors, or the other steps cannot give the value.
    """
    record = site.spec
    drop = record.labels.index(label)
    kept = [index for index in range(len(record.chain)) if index != drop]
    name = f"{record.name}: {' >> '.join(record.chain)}"
    if len(record.members) > 1 or record.source is not None or any(record.inputs) or record.members[0].kind == "buffer":
        raise PlanError(f"{name}: one step cannot be taken out of a chain over several tensors; bake the whole site")
    settled = site.settled()
    value = settled.evaluate() if keep == "value" else _skipping(settled, drop, name)
    target = value if record.layout.plain else record.layout.inward(value)
    steps = [settled.steps[index] for index in kept]
    try:
        found = invert_chain(steps, target, [()] * len(steps), from_source=False)
    except Exception as problem:
        raise PlanError(
            f"{name}: without {label!r}, the other steps have no right inverse for the value: {problem}"
        ) from problem
    originals = [original.detach().clone(memory_format=torch.contiguous_format) for original in found.originals]
    if record.outer:
        originals[0] = record.layout.part.outward(originals[0])
    if record.layout.only:
        originals.append(site.originals[-1].detach().clone())
    shorter = Shorter(site, kept, originals, found.stored, found.carries)
    _check(shorter, steps, value, name, label)
    return shorter


def _skipping(settled: Site, drop: int, name: str) -> Tensor:
    record = settled.spec
    if (drop == 0 and record.stored[0] != 1) or (drop and record.stored[drop]):
        raise PlanError(f"{name}: the step stores tensors of its own, without which there is no value; keep='value'")
    step = settled.steps[drop]
    settled._modules[str(drop)] = nn.Identity()
    value: Tensor = settled.evaluate()
    settled._modules[str(drop)] = step
    return value


def _check(shorter: Shorter, steps: Sequence[nn.Module], value: Tensor, name: str, label: str) -> None:
    record = replace(shorter.site.spec, stored=shorter.stored, carries=shorter.carries, inputs=((),) * len(steps))
    after = apply_chain(record, steps, shorter.originals, ())
    tolerance = 1e-4 if value.dtype in (torch.float32, torch.complex64) else 1e-8
    if value.dtype in (torch.float16, torch.bfloat16):
        tolerance = 3e-2
    if not torch.allclose(after, value, rtol=tolerance, atol=tolerance * float(value.abs().max() + 1e-30)):
        raise PlanError(
            f"{name}: without {label!r} the other steps cannot give the same value; "
            "bake the whole site, or take the step out with keep='original'"
        )
