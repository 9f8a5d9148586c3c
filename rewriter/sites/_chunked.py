"""One parametrization for each chunk of a tensor, where it cannot work on all chunks at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.context._fused import asks
from rewriter.sites._inverse import right_inverse


class Chunked(nn.ModuleList):
    """Apply the k-th module to the k-th slice of the first dimension.

    Arguments:
        modules: one parametrization for each slice.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules)
        self.freezes_original = any(getattr(module, "freezes_original", False) for module in modules)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the results for the slices, stacked."""
        slices = zip(*(tensor.unbind(0) for tensor in inputs), strict=True)
        return torch.stack([module(*parts) for module, parts in zip(self, slices, strict=True)])

    def right_inverse(self, value: Tensor) -> Any:
        """Return the right inverses of the slices, stacked; several tensors where the modules take several."""
        found = [right_inverse(module, part) for module, part in zip(self, value.unbind(0), strict=True)]
        if isinstance(found[0], (tuple, list)):
            return tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        return torch.stack(found)

    def fuse(self, next: nn.Module) -> nn.Module | None:
        """Return one module for each slice where the modules of every slice merge."""
        if not isinstance(next, Chunked) or len(next) != len(self):
            return None
        merged = [asks(one, "fuse", other) for one, other in zip(self, next, strict=True)]
        return Chunked(merged) if all(isinstance(module, nn.Module) for module in merged) else None

    def cancels(self, next: nn.Module) -> bool:
        """Say whether the modules of every slice undo each other."""
        if not isinstance(next, Chunked) or len(next) != len(self):
            return False
        return all(asks(one, "cancels", other) for one, other in zip(self, next, strict=True))
