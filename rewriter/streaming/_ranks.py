"""The processes of torchrun: each writes some of the shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Processes that write one output.

    Arguments:
        rank: this one.
        size: how many there are.
        here: how many of them share this machine.
    """

    rank: int = 0
    size: int = 1
    here: int = 1

    def shared(self, value: Any) -> list[Any]:
        """Return the values of all processes, once all have come here."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found


def ranks_of_torchrun() -> Ranks:
    """Return the processes that torchrun started; this one alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    size = dist.get_world_size()
    return Ranks(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
