"""One evaluation and one backward of a chain, for any number of forwards and backwards in between.

The value is given out as a leaf of its own, so that every backward ends at it and leaves its gradient there. At the
end the gathered gradient goes through the chain once. A chain that reads another chain's value reads its leaf, and so
its gradient is gathered there before that chain's turn comes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter.errors import RewriterError
from rewriter.runtime._checkpoint import unnoticed
from rewriter.runtime._gradients import WatchedGradient, is_still, is_watchable
from rewriter.runtime._signature import Signature, same_objects, sign, transformed

if TYPE_CHECKING:
    from rewriter.runtime._tensor import ParametrizedTensor


class Evaluated:
    """One evaluation of a site: its value with the chain behind it, and the leaf that stands for it."""

    def __init__(
        self, site: ParametrizedTensor, inputs: Sequence[Tensor], signature: Signature, value: Any, leaf: Any
    ) -> None:
        self.site = site
        self.inputs = tuple(inputs)
        self.signature = signature
        self.trained = [index for index, mark in enumerate(signature.marks) if mark[2]]
        self.value = value
        self.leaf = leaf
        self.arrived: list[tuple[Tensor, Tensor]] = []
        """The stored tensors with the `.grad` that each had when the last gradient arrived at the leaf."""
        self.watched: list[WatchedGradient] = []
        """What was put in their places."""

    def arrive(self) -> None:
        """Notice that a gradient arrives at the leaf: from here on `.grad` is there, or somebody has reset it."""
        if self.arrived:
            return self.check_gradients()
        for index in self.trained:
            tensor = self.signature.tensors[index]
            if any(tensor is given for given in self.inputs):
                continue
            if is_watchable(tensor.grad):
                self.watched.append(WatchedGradient(tensor))
            assert tensor.grad is not None
            self.arrived.append((tensor, tensor.grad))

    def check_gradients(self) -> None:
        """Refuse to go on after somebody has worked on gradients: what was gathered at the leaf is out of reach."""
        reset = any(not is_still(tensor.grad, before) for tensor, before in self.arrived)
        if reset or any(gradient.touched for gradient in self.watched):
            raise RewriterError(
                f"{self.site.record.name}: the gradient of a tensor that it is computed from was "
                f"{'reset' if reset else 'changed'} inside evaluate_once, after a backward whose gradient only arrives "
                "at the end. Call zero_grad() before the block; clip and unscale gradients after it"
            )

    def leave(self) -> None:
        """Put ordinary gradients back, and none where none came."""
        for gradient in self.watched:
            gradient.leave()

    def check(self, now: Signature | None) -> None:
        """Refuse to go on after a change of what was evaluated; state that the chain itself advances is none."""
        if now is None or len(now.marks) != len(self.signature.marks):
            changed = True
        else:
            changed = any(now.marks[index] != self.signature.marks[index] for index in self.trained)
        if changed:
            raise RewriterError(
                f"{self.site.record.name}: a tensor that it is computed from changed inside evaluate_once; the one "
                "evaluation would no longer be true. Step the optimizer, load and convert after the block has ended"
            )

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Return the parts of the value that have a gradient to send through the chain."""
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        leaves = self.leaf if isinstance(self.leaf, tuple) else (self.leaf,)
        return [
            (value, leaf.grad)
            for value, leaf in zip(values, leaves, strict=True)
            if value.requires_grad and leaf.grad is not None
        ]


class Once:
    """What one thread has evaluated inside one `evaluate_once`."""

    def __init__(self) -> None:
        self.own: dict[ParametrizedTensor, list[Tensor]] = {}
        self.evaluated: list[Evaluated] = []
        self.at: dict[ParametrizedTensor, list[Evaluated]] = {}

    def add(self, site: ParametrizedTensor) -> None:
        """Evaluate `site` once from now on, as long as its tensors are the ones it has now."""
        self.own[site] = list(site.parameters())
        self.at[site] = []

    def value(self, site: ParametrizedTensor, inputs: Sequence[Tensor]) -> Any:
        """Return the leaf that stands for the site's value.

        A chain over tensors that are not the model's own (`functional_call`), or that are themselves computed, is
        evaluated as ever: its gradient has to flow on. So is one whose policy is ``never``.
        """
        if transformed() or site.record.cache == "never" or not all(tensor.is_leaf for tensor in inputs):
            return site.advance(*inputs)
        if not same_objects(list(site.parameters()), self.own[site]):
            return site.advance(*inputs)
        signature = sign(site.steps, [*site.originals, *inputs])
        if signature is None or not all(tensor.is_leaf for tensor in signature.tensors):
            return site.advance(*inputs)
        for entry in self.at[site]:
            entry.check(signature if same_objects(inputs, entry.inputs) else entry.signature)
            if same_objects(inputs, entry.inputs) and entry.signature.same_settings(signature):
                return entry.leaf
        entry = self._evaluate(site, inputs, signature)
        self.at[site].append(entry)
        self.evaluated.append(entry)
        return entry.leaf

    def finish(self) -> None:
        """Send every gathered gradient through its chain, those that read others first.

        Raises:
            RewriterError: something that was evaluated has changed since; no gradient has been sent then.
        """
        for entry in self.evaluated:
            entry.check(sign(entry.site.steps, [*entry.site.originals, *entry.inputs]))
            entry.check_gradients()
        for entry in reversed(self.evaluated):
            if entry.inputs:
                _backward(entry.gradients())
        _backward([pair for entry in self.evaluated if not entry.inputs for pair in entry.gradients()])

    def leave(self) -> None:
        """Leave no trace on the stored tensors but the gradients that were sent."""
        for entry in self.evaluated:
            entry.leave()

    def _evaluate(self, site: ParametrizedTensor, inputs: Sequence[Tensor], signature: Signature) -> Evaluated:
        # Whatever mode the first use is in, later ones may need the gradient; and a checkpointed region must not
        # count the chain's intermediates among its own.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            unnoticed(),
        ):
            value = site.advance(*inputs)
            leaf = tuple(map(_leaf, value)) if isinstance(value, tuple) else _leaf(value)
        entry = Evaluated(site, inputs, signature.hold(), value, leaf)
        reference = weakref.ref(entry)  # the leaf would hold what holds it

        def arrive(gradient: Tensor) -> None:
            known = reference()
            if known is not None:
                known.arrive()

        for part in leaf if isinstance(leaf, tuple) else (leaf,):
            if part.requires_grad:
                part.register_hook(arrive)  # type: ignore[no-untyped-call]
        return entry


def _backward(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    if not pairs:
        return
    with contextlib.ExitStack() as precision:
        # The chain ran in the precision of its tensors, and the block may have been opened under autocast.
        for kind in {value.device.type for value, _ in pairs}:
            precision.enter_context(torch.autocast(kind, enabled=False))
        torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])


def _leaf(value: Tensor) -> Tensor:
    leaf = value.detach()
    if value.requires_grad:
        leaf.requires_grad_()
        leaf.register_hook(_refuse_graph)  # type: ignore[no-untyped-call]
    return leaf


def _refuse_graph(gradient: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RewriterError(
            "evaluate_once differentiates each chain once, at the end of the block, so a backward through the chain "
            "cannot itself be differentiated: take create_graph=True out, or do this backward outside evaluate_once"
        )
