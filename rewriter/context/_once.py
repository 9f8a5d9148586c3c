"""One evaluation and one backward of a chain, for any number of forwards and backwards in between.

The value is given out as a leaf of its own, so that every backward ends at it and leaves its gradient there. At the
end the gathered gradient goes through the chain once. A chain that reads another chain's value reads its leaf, and so
its gradient is gathered there before that chain's turn comes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter._torch import will_execute
from rewriter.context._checkpoint import unnoticed
from rewriter.context._fingerprint import Fingerprint, same_objects, transformed, versions_of
from rewriter.context._gradients import WatchedGradient, is_still, is_watchable
from rewriter.errors import RewriterError

if TYPE_CHECKING:
    from rewriter.sites._site import Site


class Evaluated:
    """One evaluation of a site: its value with the chain behind it, and what stands for it in the forwards."""

    def __init__(self, site: Site, inputs: Sequence[Tensor], value: Any, leaf: Any) -> None:
        self.site = site
        self.inputs = tuple(inputs)
        self.fingerprint = _fingerprint(site, inputs)  # after a state has advanced
        self.trained = self.fingerprint.trained()
        self.value = value
        self.leaf = leaf
        self.given: Any = leaf
        """What forwards get: the leaf, or the same value with a way to the originals for `torch.autograd.grad`."""
        self.versions = versions_of(leaf)
        """How often the leaf had been written to when it was made."""
        self.arrived: list[tuple[Tensor, Tensor]] = []
        """The originals with the `.grad` that each had when the last gradient arrived at the leaf."""
        self.watched: list[WatchedGradient] = []
        """What was put in their places."""

    def arrive(self) -> None:
        """Notice that a gradient arrives at the leaf: from here on `.grad` is there, or somebody has reset it."""
        if self.arrived:
            return self.check_gradients()
        for tensor in self.trained:
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
                f"{self.site.spec.name}: the gradient of a tensor that it is computed from was "
                f"{'reset' if reset else 'changed'} inside evaluate_once, after a backward whose gradient only arrives "
                "at the end. Call zero_grad() before the block; clip and unscale gradients after it"
            )

    def leave(self) -> None:
        """Put ordinary gradients back, and none where none came."""
        for gradient in self.watched:
            gradient.leave()

    def check(self) -> bool:
        """Say whether the tensors have the content that was evaluated.

        Raises:
            RewriterError: they have not, and gradients depend on it; or somebody wrote to the value.
        """
        if self.versions != versions_of(self.leaf) and not self.site.renormed:
            raise RewriterError(
                f"{self.site.spec.name}: its value was written to inside evaluate_once, where all forwards share it; "
                "write to a clone(), or give the tensor another value with rewriter.state.set_value before the block"
            )
        same = self.fingerprint.same_content()
        if self.trained and not same:
            raise RewriterError(
                f"{self.site.spec.name}: a tensor that it is computed from changed inside evaluate_once; the one "
                "evaluation would no longer be true. Step the optimizer, load and convert after the block has ended"
            )
        return same

    def is_valid(self) -> bool:
        """Say whether the value may be used again; one without gradients is evaluated again after a change."""
        same_trained = same_objects(self.fingerprint.trained(), self.trained)
        return self.check() and same_trained and self.fingerprint.same_settings()

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
    """What one thread has evaluated inside one `evaluate_once`.

    Arguments:
        distributed: whether DistributedDataParallel counts the gradients that arrive at the originals.
    """

    def __init__(self, distributed: bool = False) -> None:
        self.distributed = distributed
        self.own: dict[Site, list[Tensor]] = {}
        self.evaluated: list[Evaluated] = []
        self.at: dict[Site, list[Evaluated]] = {}

    def add(self, site: Site) -> None:
        """Evaluate `site` once from now on, as long as its tensors are the ones it has now."""
        self.own[site] = list(site.parameters())
        self.at[site] = []

    def value(self, site: Site, inputs: Sequence[Tensor]) -> Any:
        """Return the leaf that stands for the site's value.

        A chain over tensors that are not the model's own (`functional_call`), or that are themselves computed, is
        evaluated as outside: its gradient has to flow on. The same holds for ``cache: never``.
        """
        if transformed() or site.spec.cache == "never" or not all(tensor.is_leaf for tensor in inputs):
            return site.advance(*inputs)
        if not same_objects(list(site.parameters()), self.own[site]):
            return site.advance(*inputs)
        for entry in self.at[site]:
            if same_objects(inputs, entry.inputs) and entry.is_valid():
                return entry.given
        fingerprint = _fingerprint(site, inputs)
        if not fingerprint.trusted or not all(tensor.is_leaf for tensor in fingerprint.tensors):
            return site.advance(*inputs)
        entry = self._evaluate(site, inputs)
        self.at[site].append(entry)
        self.evaluated.append(entry)
        return entry.given

    def finish(self) -> None:
        """Send every gathered gradient through its chain, those that read others first.

        Raises:
            RewriterError: something that was evaluated has changed since; no gradient has been sent then.
        """
        for entry in self.evaluated:
            entry.check()
            entry.check_gradients()
        with _trained([tensor for entry in self.evaluated if entry.gradients() for tensor in entry.trained]):
            for entry in reversed(self.evaluated):
                if entry.inputs:
                    _backward(entry.gradients())
            _backward([pair for entry in self.evaluated if not entry.inputs for pair in entry.gradients()])

    def leave(self) -> None:
        """Leave no trace on the stored tensors but the gradients that were sent."""
        for entry in self.evaluated:
            entry.leave()

    def _evaluate(self, site: Site, inputs: Sequence[Tensor]) -> Evaluated:
        # Whatever mode the first use is in, later ones may need the gradient; and a checkpointed region must not
        # count the chain's intermediates among its own.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            unnoticed(),
        ):
            value = site.advance(*inputs)
            leaf = tuple(map(_leaf, value)) if isinstance(value, tuple) else _leaf(value)
        entry = Evaluated(site, inputs, value, leaf)
        reference = weakref.ref(entry)  # the leaf refers to the hook

        def arrive(gradient: Tensor) -> None:
            known = reference()
            if known is not None:
                known.arrive()

        parts = leaf if isinstance(leaf, tuple) else (leaf,)
        for part in parts:
            if part.requires_grad:
                part.register_hook(arrive)  # type: ignore[no-untyped-call]
        originals = entry.trained
        if all(part.requires_grad for part in parts) and not self.distributed and not any(map(_has_hooks, originals)):
            with torch.enable_grad(), unnoticed():
                apply: Any = _Gathered.apply
                given = tuple(apply(entry, part, index, *originals) for index, part in enumerate(parts))
            entry.given = given if isinstance(leaf, tuple) else given[0]
        return entry


class _Gathered(torch.autograd.Function):
    """A value whose gradient is gathered at the leaf, and sent through the chain for `torch.autograd.grad`.

    In a backward that accumulates, the originals get nothing here: the block's end sends what was gathered. A
    `torch.autograd.grad` with respect to originals gets their gradients at once.
    """

    @staticmethod
    def forward(ctx: Any, entry: Evaluated, leaf: Tensor, index: int, *originals: Tensor) -> Tensor:
        ctx.entry, ctx.index, ctx.originals = weakref.ref(entry), index, originals
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        entry: Evaluated | None = ctx.entry()
        if entry is None:
            raise RewriterError("a backward after its evaluate_once block has ended: run it inside the block")
        _refuse_graph(gradient)
        value = entry.value[ctx.index] if isinstance(entry.value, tuple) else entry.value
        nodes = [node for node, _ in ctx.next_functions if node is not None]
        if not _accumulates(nodes):
            found = torch.autograd.grad(value, ctx.originals, gradient, retain_graph=True, allow_unused=True)
            return None, None, None, *found
        leaf = entry.leaf[ctx.index] if isinstance(entry.leaf, tuple) else entry.leaf
        torch.autograd.backward(leaf, gradient)
        return None, None, None, *[None for _ in ctx.originals]


def _accumulates(nodes: Sequence[Any]) -> bool:
    """Whether the running backward adds to ``.grad``; torch refuses the question of a leaf in `autograd.grad`."""
    try:
        for node in nodes:
            will_execute(node)
    except RuntimeError:
        return False
    return True


def _fingerprint(site: Site, inputs: Sequence[Tensor]) -> Fingerprint:
    return Fingerprint(site.steps, [*site.originals, *inputs], owners=[site])


def _has_hooks(tensor: Tensor) -> bool:
    """Whether anything watches the gradient that arrives: it would see each backward, without a gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks) or not tensor.is_leaf


def _backward(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    if not pairs:
        return
    with contextlib.ExitStack() as precision:
        # The chain ran in the precision of its tensors, and the block may have been opened under autocast.
        for kind in {value.device.type for value, _ in pairs}:
            precision.enter_context(torch.autocast(kind, enabled=False))
        torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])


@contextlib.contextmanager
def _trained(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let tensors that are frozen by now get the gradients of the backwards in which they were not."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


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
