"""Neighbouring steps that are evaluated as one, or not at all: a chain can be shorter when it runs than as written.

The steps stay where they are, since their tensors are the state dict's. What is evaluated in their place is made from
them, and made again whenever one of them has changed: another mask was loaded, a factor was set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewriter.context._fingerprint import Fingerprint, transformed

if TYPE_CHECKING:
    from rewriter.sites._site import Site

Group = tuple[int, int]
"""The first step of a group, and the one after its last."""


@dataclass
class Run:
    """Consecutive steps and the one module that stands for them; ``None`` where they cancel.

    Arguments:
        start: index of the first step.
        stop: index after the last one.
        module: what stands for them.
    """

    start: int
    stop: int
    module: nn.Module | None


def groups_of(site: Site) -> tuple[Group, ...]:
    """Return the groups of two and more steps of `site` that can be evaluated as one.

    A step takes part if it is a function of one tensor that trains nothing, draws nothing and advances no state, and
    merges with its neighbour (``fuse``) or undoes it (``cancels``).
    """
    record = site.spec
    alone = [
        not inputs and stored == (index == 0 and record.source is None)
        for index, (stored, inputs) in enumerate(zip(record.stored, record.inputs, strict=True))
    ]
    plain = [one and _is_fixed(step) for one, step in zip(alone, site.steps, strict=True)]
    runs = merged_runs(site.steps, plain, site.hoisted)
    return tuple((run.start, run.stop) for run in runs if run.stop - run.start > 1)


@torch.no_grad()
def merged_runs(steps: Sequence[nn.Module], plain: Sequence[bool], barrier: int = 0) -> list[Run]:
    """Merge neighbours from left to right until none are left that merge.

    Arguments:
        steps: the chain.
        plain: for each step, whether it may take part.
        barrier: no group reaches from before this step beyond it.
    """
    runs: list[Run] = []
    for index, step in enumerate(steps):
        run = Run(index, index + 1, step)
        if plain[index]:
            before = runs[-1] if runs and plain[runs[-1].start] and index != barrier else None
            if before is not None and before.module is None:
                # Steps that cancel at the front: the next one starts where they did.
                runs.pop()
                run = Run(before.start, index + 1, step)
            elif before is not None and before.module is not None:
                if asks(before.module, "cancels", step):
                    runs.pop()
                    run = Run(before.start, index + 1, None)
                    if runs and plain[runs[-1].start] and before.start != barrier:
                        # What stands before them comes next to what follows.
                        run = Run(runs[-1].start, index + 1, runs.pop().module)
                else:
                    merged = asks(before.module, "fuse", step)
                    if isinstance(merged, nn.Module):
                        runs.pop()
                        run = Run(before.start, index + 1, merged)
        runs.append(run)
    return runs


def evaluated_steps(site: Site) -> Sequence[Callable[..., Any]]:
    """Return what is called for each step of `site`: itself; or for a group, one module and then nothing.

    Where the program is recorded rather than run (torch.compile, torch.export, transforms, CUDA graphs) the chain is
    evaluated as it is written: what was merged before would be recorded as a constant.
    """
    steps: list[Any] = site.steps
    if torch.compiler.is_compiling() or transformed() or _recorded_on_gpu(site):
        return steps
    called = list(steps)
    for start, stop in site.fused:
        found = _merged(site, start, steps[start:stop])
        if found is not None:
            called[start:stop] = [found.call, *[_unchanged] * (stop - start - 1)]
    return called


@dataclass
class Merged:
    """The module that is called in place of several steps.

    Arguments:
        call: the module, or a function that returns its argument.
        fingerprint: of the steps when it was made.
    """

    call: Callable[..., Any]
    fingerprint: Fingerprint


def _merged(site: Site, start: int, steps: Sequence[nn.Module]) -> Merged | None:
    known: Merged | None = site.policy.merged.get(start)
    if known is not None and known.fingerprint.unchanged():
        return known
    fingerprint = Fingerprint(steps)
    fixed = all(map(_is_fixed, steps)) and not fingerprint.trained()
    if not fixed or not fingerprint.trusted:
        return None
    with torch.inference_mode(False):
        runs = merged_runs(steps, [True] * len(steps))
    if len(runs) != 1:
        return None
    made = site.policy.merged[start] = Merged(runs[0].module or _unchanged, fingerprint)
    return made


def _recorded_on_gpu(site: Site) -> bool:
    return any(tensor.is_cuda for tensor in site.originals) and torch.cuda.is_current_stream_capturing()


def _unchanged(value: Tensor) -> Tensor:
    return value


def _is_fixed(step: nn.Module) -> bool:
    for part in _parts(step):
        state = part.__dict__
        if state["_parameters"] or state["_forward_hooks"] or state["_forward_pre_hooks"]:
            return False
        if getattr(part, "stateful", False) or getattr(part, "random", False):
            return False
    return True


def _parts(step: nn.Module) -> Iterable[nn.Module]:
    # Nearly every step is one module, for which torch's walk costs more than the look at it.
    return step.modules() if step._modules else (step,)


def asks(module: nn.Module, question: str, following: nn.Module) -> Any:
    """Return what a step says of the one that follows it: ``fuse`` or ``cancels``; nothing where it has no say."""
    answer = getattr(module, question, None)
    return answer(following) if callable(answer) else None
