"""`memory: recompute`: a chain is evaluated again in backward, instead of saving its intermediates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewriter._given import is_managed
from rewriter.context._fingerprint import mark, transformed, version_of
from rewriter.errors import RewriterError

if TYPE_CHECKING:
    from rewriter.sites._site import Site


def recomputed(site: Site, inputs: Sequence[Tensor]) -> Any:
    """Return the site's value; its backward runs the chain again, with the tensors and random numbers of now.

    A state that the chain advances is put back for the second run, on a copy. Under torch.compile and the transforms
    of torch.func the chain runs once: the first decides by itself what to compute again, the second support no
    checkpoint.

    Raises:
        RewriterError: a step advances a buffer and does not declare ``stateful = True``; or, in backward, a stored
            tensor has changed since the forward.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return site.compose(*inputs)
    snapshot = _bound(site)
    buffers = list(site.buffers())
    versions = [version_of(buffer) for buffer in buffers]
    declared = {id(buffer) for step in site.modules() if _stateful(step) for buffer in step.buffers()}
    sources = [*site.parameters(), *inputs]
    marks = [mark(source) for source in sources]
    again = False

    def run(*given: Tensor) -> Any:
        nonlocal again
        if not again:
            again = True
            return site.compose(*given)
        # FSDP frees whole tensors after the forward, and gathers them again for the backward.
        if not is_managed(site) and [mark(source) for source in sources] != marks:
            raise RewriterError(
                f"{site.spec.name}: a tensor that it is computed from was modified between forward and backward, "
                "and `memory: recompute` evaluates it again in backward"
            )
        return _bound(snapshot).compose(*given)

    value = checkpoint(run, *inputs, use_reentrant=False)
    for buffer, version in zip(buffers, versions, strict=True):
        if id(buffer) not in declared and version_of(buffer) != version:
            raise RewriterError(
                f"{site.spec.name}: a step changes its buffers as it runs and does not say so, so that `memory: "
                "recompute` would not repeat it; set `stateful = True` on its class"
            )
    return value


def _bound(module: Any) -> Any:
    """Return the module over the tensors of now, whatever is put into the original later; with states of its own."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update(module.__dict__)
    copied = _stateful(module)
    clone.__dict__["_parameters"] = dict(module._parameters)
    clone.__dict__["_buffers"] = {
        name: buffer.clone() if copied and buffer is not None else buffer for name, buffer in module._buffers.items()
    }
    clone.__dict__["_modules"] = {
        name: None if child is None else _bound(child) for name, child in module._modules.items()
    }
    return clone


def _stateful(module: nn.Module) -> bool:
    return module.training and bool(getattr(module, "stateful", False))
