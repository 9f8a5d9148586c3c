"""A chain under construction: its steps and originals, found from the last step to the first."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter._given import kind_of
from rewriter.language import Step
from rewriter.parametrizations._registry import construct
from rewriter.parametrizations.maths._checks import OF_MATRICES, REQUIREMENTS, require_no_kernel
from rewriter.planning._resolve import Claim
from rewriter.planning._survey import Entry, dtype_name
from rewriter.sites import Chunked, Layout, Site, layout_of
from rewriter.sites._gathered import gathered
from rewriter.sites._inverse import Inverse, carry_of, parts_of, right_inverse
from rewriter.sites._steps import apply_steps

_CONV1D = (nn.Conv1d, nn.ConvTranspose1d)


class BuildError(Exception):
    """A chain that does not fit its site. The text gives the reason, the caller adds the place."""


class Chain:
    """The chain of one claim. Each step is constructed from the value that it has to produce.

    The loop goes from the last step to the first. A step sees the value in the dtype that the step before it gives.
    Its right inverse runs once, and gives the value for the step before.

    Arguments:
        claim: the rule and the tensors.
        inputs: values of the further tensors that the chain reads, by name.
        shared: steps to use instead of new ones (`share: true`).
        gather: whether to make a tensor whole that is distributed over processes.
        copies: whether originals must not be the tensors of the claim themselves.
    """

    def __init__(
        self,
        claim: Claim,
        inputs: Mapping[str, Tensor],
        shared: Sequence[nn.Module] | None = None,
        *,
        gather: bool = False,
        copies: bool = True,
    ) -> None:
        self.copies = copies
        self.claim, self.rule, self.inputs, self.shared = claim, claim.rule, inputs, shared
        self.layout = layout_of_claim(claim)
        values = [value_of(entry) for entry in claim.entries]
        self.like = values[0] if gather else None
        """The tensor as it is distributed, of a chain that works on whole ones."""
        if gather:
            values = list(map(gathered, values))
            self.inputs = {name: gathered(tensor) for name, tensor in inputs.items()}
        if len(values) > 1 and not self.layout.plain:
            raise BuildError("`joint` cannot be combined with `per` or `reshape`")
        self.extra: dict[int, Sequence[Mapping[str, Any]]] = {}
        """Constructor arguments decided over all sites of a rule: by the step's index, one mapping for each chunk."""
        self.steps: list[nn.Module] = []
        self.refits: dict[int, Tensor] = {}
        """Stateful steps whose right inverse gives back its argument, with the value that they were fitted to."""
        self.listed = False
        """Whether the right inverse of the first step gives a sequence."""
        first = values[0]
        self._restart(tuple(values) if len(values) > 1 else first if self.layout.plain else self.layout.inward(first))
        self._entering = self._entering_dtypes()

    def _restart(self, target: Any) -> None:
        """Start from a value in the chain's own view of the tensor."""
        self.value = target
        self._index = len(self.rule.chain)
        self._parts: list[list[Tensor]] = []
        self._carries: list[int] = []

    def seen(self, index: int) -> Tensor:
        """Return the tensor from which step `index` is constructed, after the steps behind it are done."""
        self._go_to(index + 1)
        return first_of(self._seen_by(index))

    def finish(self) -> Inverse:
        """Construct the remaining steps, and return the originals and how the steps share them."""
        if self.rule.init == "sample":
            if self.shared is None:
                self._go_to(0, invert_first=False)
                self.shared = self.steps
            self._restart(_sample(self.shared))
        self._go_to(0)
        # A step without right inverse passes the model's own tensor through: originals are copies.
        originals = [part for parts in reversed(self._parts) for part in parts]
        if self.copies:
            originals = [part.clone(memory_format=torch.contiguous_format) for part in originals]
        stored = tuple(len(parts) for parts in reversed(self._parts))
        return Inverse(originals, stored, tuple(reversed(self._carries)))

    def _go_to(self, end: int, invert_first: bool = True) -> None:
        while self._index > end:
            self._index -= 1
            index = self._index
            value = self._seen_by(index)
            if self.shared is None:
                self.steps.insert(0, self.construct(index, first_of(value)))
            else:
                self.steps = list(self.shared)
            if index or invert_first:
                self._invert(index, self.steps[index if self.shared is not None else 0], value)

    def construct(self, index: int, weight: Tensor | None = None) -> nn.Module:
        """Construct one step; `weight` is the tensor that it sees, where that is not the chain's value."""
        weight = first_of(self._seen_by(index)) if weight is None else weight
        step = self.rule.chain[index]
        try:
            self._require(step, weight)
            return _make(step, weight, self.layout, self.extra.get(index, ()), transposed(self.claim))
        except Exception as problem:
            raise BuildError(f"step {index + 1}, {step}: {first_line(problem)}") from problem

    def _require(self, step: Step, weight: Tensor) -> None:
        """Refuse a tensor that the step declares not to take (``takes``)."""
        takes = getattr(step.factory if step.module is None else step.module, "takes", ())
        if OF_MATRICES.intersection(takes) and not self.layout.matrix:
            owners = self.claim.entries[0].owners
            most = 2 if owners and isinstance(owners[0][0], _CONV1D) else 3
            require_no_kernel(step.name, value_of(self.claim.entries[0]), most)
        for kind in takes if step.module is not None else ():  # a constructor asks for itself
            REQUIREMENTS[kind](step.name, weight)

    def _invert(self, index: int, module: nn.Module, value: Any) -> None:
        step = self.rule.chain[index]
        further = [self.inputs[name] for name in step.inputs]
        try:
            found = value if self.rule.init == "raw" else right_inverse(module, value, further)
        except Exception as problem:
            raise BuildError(
                f"step {index + 1}, {step}: its right inverse fails on the tensor: {first_line(problem)}"
                " (with `init: raw` the tensor is stored as it is)"
            ) from problem
        parts = parts_of(found)
        if index == 0 and len(self.claim.entries) == 1:
            self.listed = not isinstance(found, Tensor)
        _check_parts(index, step, module, parts, first_of(value))
        check_arity(module, step, len(parts) + len(further))
        starts = index == 0 and self.rule.source is None
        carry = 0 if starts else carry_of(module, parts, value.shape if isinstance(value, Tensor) else None)
        if not starts:
            self.value = parts.pop(carry)
            if self.rule.init != "raw" and any(getattr(part, "stateful", False) for part in module.modules()):
                same = isinstance(value, Tensor) and self.value.shape == value.shape and torch.equal(self.value, value)
                if same and not value.is_meta:
                    self.refits[index] = self.value
        self._carries.append(carry)
        self._parts.append(parts)

    def refit(self, site: Site) -> None:
        """Fit each stateful step to the value that it receives, where that is not the value it was constructed from.

        A power iteration starts from the singular vectors of its input. The step before may not reach the value that
        the right inverses asked it for.
        """
        reads = [self.inputs[name] for name in site.spec.reads]
        for index, expected in sorted(self.refits.items()):
            before = site.settled()
            received = apply_steps(site.spec, before.steps[:index], before.originals, reads)
            rounding = 1e2 * torch.finfo(expected.dtype).eps
            if received.shape != expected.shape or not torch.allclose(received, expected, rounding, rounding):
                right_inverse(site.steps[index], received, [self.inputs[n] for n in self.rule.chain[index].inputs])

    def _seen_by(self, index: int) -> Any:
        dtype = self._entering[index]
        if dtype is None or not isinstance(self.value, Tensor) or not self.value.is_floating_point():
            return self.value
        return self.value.to(dtype)

    def _entering_dtypes(self) -> list[torch.dtype | None]:
        """Return for each step the dtype of what the step before it gives; ``None`` throughout where no step casts.

        A step casts if it says ``preserves_dtype = False`` and has the dtype that it gives as its attribute ``dtype``.
        """
        chain = self.rule.chain
        casting = [
            getattr(step.factory if step.module is None else step.module, "preserves_dtype", True) is False
            for step in chain
        ]
        if not any(casting):
            return [None] * len(chain)
        weight = first_of(self.value)
        dtype = weight.dtype if self.rule.source is None else self.inputs[self.rule.source].dtype
        entering: list[torch.dtype | None] = []
        for index, step in enumerate(chain):
            entering.append(dtype)
            if casting[index]:
                made = step.module if step.module is not None else self.construct(index, weight.to(dtype))
                found = getattr(made, "dtype", None)
                dtype = found if isinstance(found, torch.dtype) else dtype
        return entering


def layout_of_claim(claim: Claim) -> Layout:
    """Return the view of the claimed tensor that its chain works on.

    Raises:
        BuildError: the tensor cannot be cut or reshaped so.
    """
    rule = claim.rule
    try:
        per = None if rule.per is None else (rule.per.dim, rule.per.chunks, rule.per.only or ())
        return layout_of(claim.entries[0].infos[0].shape, per, rule.reshape)
    except ValueError as problem:
        raise BuildError(str(problem)) from problem


def arguments_of(step: Step) -> dict[str, Any]:
    """Return a step's arguments. A relative file name (``path_arguments``) starts from the folder of the spec."""
    arguments = dict(step.arguments)
    for name in getattr(step.factory, "path_arguments", ()):
        if isinstance(arguments.get(name), str):
            arguments[name] = str(Path(step.location.file).parent / arguments[name])
    return arguments


def transposed(claim: Claim) -> bool:
    """Say whether a claim's tensor is the kernel of a transposed convolution, whose outputs are dimension 1."""
    owners = claim.entries[0].owners
    return bool(owners) and isinstance(owners[0][0], (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def _make(
    step: Step, weight: Tensor, layout: Layout, extra: Sequence[Mapping[str, Any]], transposed: bool
) -> nn.Module:
    """Construct a step; `extra` has further arguments for each chunk."""
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


def _sample(steps: Sequence[nn.Module]) -> Any:
    """Draw a value from the last step that can draw one, and map it through the steps after it."""
    for index in reversed(range(len(steps))):
        draw: Any = getattr(steps[index], "sample", None)
        if draw is not None:
            value = draw()
            for step in steps[index + 1 :]:
                value = step(value)
            return value
    raise BuildError("`init: sample` needs a step that can draw from its space, and none of the chain can")


def _check_parts(index: int, step: Step, module: nn.Module, parts: Sequence[Any], value: Tensor) -> None:
    """Refuse what a right inverse must not return; it is stored as a Parameter or goes to the step before."""
    other = hasattr(module, "storage_dtype") or getattr(module, "preserves_dtype", True) is False
    number = (value.is_floating_point() or value.is_complex()) and not other
    for part in parts:
        wrong = ""
        if not isinstance(part, Tensor):
            wrong = kind_of(part)
        elif part.device != value.device:
            wrong = f"a tensor on {part.device} for a tensor on {value.device}"
        elif type(part) not in (Tensor, nn.Parameter, type(value)):
            wrong = f"a {type(part).__name__}, a subclass of Tensor"
        elif number and part.dtype != value.dtype and not _complex_or_not(part, value):
            wrong = f"{dtype_name(part.dtype)} for {dtype_name(value.dtype)}, and has no `preserves_dtype = False`"
        if wrong:
            raise BuildError(
                f"step {index + 1}, {step}: its right inverse returns {wrong}; it has to return the tensor, or the "
                "sequence of tensors, that its forward maps to the value"
            )


def _complex_or_not(part: Tensor, value: Tensor) -> bool:
    """Say whether one of two numbers is complex and the other is its real or imaginary part."""
    return (
        {part.is_complex(), value.is_complex()}
        == {True, False}
        == {part.is_floating_point(), value.is_floating_point()}
    )


def check_arity(step: nn.Module, named: Step, given: int) -> None:
    """Refuse a step whose forward does not take as many tensors as the chain gives it."""
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


def first_of(value: Any) -> Tensor:
    """Return the tensor, or the first of several."""
    first: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return first


def value_of(entry: Entry) -> Tensor:
    """Return the tensor of an entry that no chain computes yet."""
    assert entry.tensor is not None
    return entry.tensor.detach()


def first_line(problem: BaseException) -> str:
    """Return an error's first line, or its class name where it has no text."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
