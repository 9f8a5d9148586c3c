"""Constructing a chain's steps, each for the tensor that it will have to produce."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.language import Rule, Step
from rewriter.parametrizations._registry import construct
from rewriter.planning._resolve import Claim
from rewriter.planning._survey import Entry
from rewriter.sites import Chunked, Layout, layout_of
from rewriter.sites._inverse import carry_of, parts_of, right_inverse

Extra = Mapping[int, Sequence[Mapping[str, Any]]]
"""Constructor arguments decided over all sites of a rule: by the step's index, one mapping for each chunk."""


class BuildError(Exception):
    """A chain that cannot be put on its site; the text says why, the caller where."""


def layout_of_claim(claim: Claim) -> Layout:
    """Return the view of the claimed tensor that its chain works on.

    Raises:
        BuildError: the tensor cannot be cut or reshaped so.
    """
    rule = claim.rule
    try:
        per = None if rule.per is None else (rule.per.dim, rule.per.chunks)
        return layout_of(claim.entries[0].infos[0].shape, per, rule.reshape)
    except ValueError as problem:
        raise BuildError(str(problem)) from problem


@torch.no_grad()
def seen_by(claim: Claim, index: int, inputs: Mapping[str, Tensor], extra: Extra) -> Tensor:
    """Return the tensor that a claim's step is constructed for: what the steps after it map to the claimed one."""
    values = [value_of(entry) for entry in claim.entries]
    target: Any = values[0] if len(values) == 1 else tuple(values)
    value = construct_steps(claim.rule, layout_of_claim(claim), target, inputs, extra, index + 1, transposed(claim))[1]
    return first_of(value)


def arguments_of(step: Step) -> dict[str, Any]:
    """Return a step's arguments; those that name files, as ``path_arguments`` says, from the spec's own folder."""
    arguments = dict(step.arguments)
    for name in getattr(step.factory, "path_arguments", ()):
        if isinstance(arguments.get(name), str):
            arguments[name] = str(Path(step.location.file).parent / arguments[name])
    return arguments


def transposed(claim: Claim) -> bool:
    """Return whether a claim's tensor is the kernel of a transposed convolution, whose outputs are dimension 1."""
    owners = claim.entries[0].owners
    return bool(owners) and isinstance(owners[0][0], (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def construct_steps(
    rule: Rule,
    layout: Layout,
    target: Any,
    inputs: Mapping[str, Tensor],
    extra: Extra,
    start: int = 0,
    transposed: bool = False,
) -> tuple[list[nn.Module], Any]:
    """Make the steps from `start` on, the last one first: each sees the tensor that it will have to produce.

    It sees it in the precision that the steps before it will give it; see `_entering`.

    Returns:
        The steps, and the value from which they compute the target.
    """
    steps: list[nn.Module] = []
    value = target if layout.plain else layout.inward(target)
    entering = _entering(rule, value, inputs)
    for index in reversed(range(start, len(rule.chain))):
        step = rule.chain[index]
        weight = first_of(value)
        dtype = entering[index]
        try:
            weight = weight if dtype is None else weight.to(dtype)
            module = _make(step, weight, layout, extra.get(index, ()), transposed)
            if index and rule.init != "raw":
                parts = parts_of(right_inverse(module, value, [inputs[name] for name in step.inputs]))
                value = parts[carry_of(module, parts, weight.shape)]
        except BuildError:
            raise
        except Exception as problem:
            raise BuildError(f"step {index + 1}, {step}: {first_line(problem)}") from problem
        steps.insert(0, module)
    return steps, value


def _entering(rule: Rule, value: Any, inputs: Mapping[str, Tensor]) -> list[torch.dtype | None]:
    """Return for each step the dtype of what the step before it gives; ``None`` throughout where no step casts.

    A step casts if it says ``preserves_dtype = False`` and has the dtype that it gives as its attribute ``dtype``.
    """
    casting = [
        getattr(step.factory if step.module is None else step.module, "preserves_dtype", True) is False
        for step in rule.chain
    ]
    if not any(casting):
        return [None] * len(rule.chain)
    weight = first_of(value)
    dtype = weight.dtype if rule.source is None else inputs[rule.source].dtype
    entering: list[torch.dtype | None] = []
    for index, step in enumerate(rule.chain):
        entering.append(dtype)
        if casting[index]:
            try:
                made = (
                    step.module
                    if step.module is not None
                    else _make(step, weight.to(dtype), Layout(tuple(weight.shape)), ())
                )
            except Exception as problem:
                raise BuildError(f"step {index + 1}, {step}: {first_line(problem)}") from problem
            found = getattr(made, "dtype", None)
            dtype = found if isinstance(found, torch.dtype) else dtype
    return entering


def _make(
    step: Step, weight: Tensor, layout: Layout, extra: Sequence[Mapping[str, Any]], transposed: bool = False
) -> nn.Module:
    """Construct a step; `extra` are further arguments for each chunk, where they were decided for each."""
    arguments = arguments_of(step)

    def one(weight: Tensor, further: Mapping[str, Any]) -> nn.Module:
        if step.module is not None:
            return copy.deepcopy(step.module)
        assert step.factory is not None
        return construct(step.factory, weight, {**arguments, **further}, transposed)

    if not layout.chunks:
        return one(weight, extra[0] if extra else {})
    if extra:
        return Chunked([one(chunk, further) for chunk, further in zip(weight.unbind(0), extra, strict=True)])
    module = one(weight, {})
    if getattr(module, "batched", False):
        return module
    return Chunked([one(chunk, {}) for chunk in weight.unbind(0)])


def first_of(value: Any) -> Tensor:
    first: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return first


def value_of(entry: Entry) -> Tensor:
    """Return the tensor of an entry that no chain computes yet."""
    assert entry.tensor is not None
    return entry.tensor.detach()


def first_line(problem: BaseException) -> str:
    """Return an error's first line, or its kind where it says nothing."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
