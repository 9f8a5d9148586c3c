"""Finding the layers of a rewritten `nn.Sequential` by their place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import overload

from torch import nn

from rewriter.sites._places import BATCHES


class Layers(nn.Module):
    """A module whose submodules are layers in order."""

    def __len__(self) -> int:
        return len(self._layers())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._layers().values())

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> nn.Sequential: ...

    def __getitem__(self, index: int | slice) -> nn.Module:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict([*self._layers().items()][index]))
        return self._layers()[self._key(index)]

    def __setitem__(self, index: int, layer: nn.Module) -> None:
        setattr(self, self._key(index), layer)

    def _key(self, index: int) -> str:
        keys = [*self._layers()]
        if not -len(keys) <= index < len(keys):
            raise IndexError(f"layer {index} of {len(keys)}")
        return keys[index]

    def _layers(self) -> dict[str, nn.Module]:
        """Return the layers by name, without what evaluates several tensors at once."""
        return {name: layer for name, layer in self._modules.items() if layer is not None and name != BATCHES}
