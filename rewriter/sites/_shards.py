"""Tensors that are distributed over processes (DTensors): a chain is evaluated on whole ones, one site at a time.

Every process takes part in each call here, in the same order.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from rewriter._given import is_distributed
from rewriter.errors import PlanError
from rewriter.sites._container import sites_of
from rewriter.sites._gathered import gathered, possible
from rewriter.sites._site import Site


def whole(tensor: Any) -> Any:
    """Return all of a DTensor as a plain tensor; anything else as it is."""
    return gathered(tensor.detach()) if is_distributed(tensor) else tensor


def as_shards(name: str, value: Tensor, like: Any) -> Tensor:
    """Return this process's shards of a tensor, distributed as `like` is; all of it if `like` is no DTensor.

    Raises:
        PlanError: `like` is distributed in a way that plain tensors cannot be brought into.
    """
    if not is_distributed(like) or not value.dim():
        return value
    kinds = {type(placement).__name__ for placement in like.placements}
    if not kinds <= {"Shard", "Replicate"}:
        raise PlanError(
            f"{name} is distributed as {', '.join(map(str, like.placements))}, and a whole tensor becomes shards for "
            "Shard and Replicate alone: save the model with torch.distributed.checkpoint, load the checkpoint into a "
            "model of one process, and continue there"
        )
    distribute: Callable[..., Tensor] = sys.modules["torch.distributed.tensor"].distribute_tensor
    return distribute(value, like.device_mesh, possible(like.placements, value.dim()), src_data_rank=None)


def values_of(site: Site, evaluate: Callable[[Site], Sequence[Tensor]]) -> list[Tensor]:
    """Return the values that `evaluate` gives for a site over whole tensors, distributed as its first tensor is.

    Raises:
        PlanError: the tensors are distributed in a way that plain ones cannot be brought into.
    """
    shards = [tensor for tensor in (*site.originals, *site.parameters()) if is_distributed(tensor)]
    if not shards:
        return list(evaluate(site))
    with all_whole(site):
        values = [value.detach() for value in evaluate(site)]
    return [as_shards(site.spec.name, value, shards[0]) for value in values]


@contextlib.contextmanager
def all_whole(site: Site, keep: bool = False) -> Iterator[None]:
    """Put whole tensors in the places of those that a site reads.

    Arguments:
        site: the site.
        keep: whether the site's own shards get what was written to the whole tensors.
    """
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    known: dict[int, Tensor] = {}
    try:
        for tensors, name in _slots(site, set()):
            tensor = tensors[name]
            if is_distributed(tensor):
                if id(tensor) not in known:
                    plain = whole(tensor)
                    known[id(tensor)] = nn.Parameter(plain, False) if isinstance(tensor, nn.Parameter) else plain
                replaced.append((tensors, name, tensor))
                tensors[name] = known[id(tensor)]
        yield
        own = {id(tensor) for tensor in site.parameters()} if keep else ()
        for tensors, name, tensor in replaced:
            if id(tensors[name]) in own:
                tensor.copy_(as_shards(site.spec.name, tensors[name].detach(), tensor))
    finally:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor


def _slots(site: Site, seen: set[Site]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where the tensors are that a site computes from, also through other sites."""
    if site in seen:
        return
    seen.add(site)
    for module in site.modules():
        for tensors in (module._parameters, module._buffers):
            yield from ((tensors, name) for name in tensors)
    for reference, name in site._places:
        owner = reference.module
        computed = sites_of(owner).get(name)
        if computed is not None:
            yield from _slots(computed, seen)
        yield from ((tensors, name) for tensors in (owner._parameters, owner._buffers) if tensors.get(name) is not None)
