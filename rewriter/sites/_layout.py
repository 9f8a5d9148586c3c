"""How a chain sees a tensor: whole, in chunks, or as another shape; and the way back."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The view of a tensor that a chain works on.

    >>> gates = Layout(shape=(12, 5), chunks=4)
    >>> gates.inner
    (4, 3, 5)

    Arguments:
        shape: the tensor's own shape.
        dim: the dimension cut into chunks, non-negative.
        chunks: how many equal chunks; they become a new first dimension. 0 leaves the tensor whole.
        matrix: the shape each chunk (or the whole tensor) is given; empty leaves it as it is.
    """

    shape: tuple[int, ...]
    dim: int = 0
    chunks: int = 0
    matrix: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the chain sees the tensor as it is."""
        return not self.chunks and not self.matrix

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of one chunk, before `matrix`."""
        if not self.chunks:
            return self.shape
        return (*self.shape[: self.dim], self.shape[self.dim] // self.chunks, *self.shape[self.dim + 1 :])

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape the chain sees."""
        last = self.matrix or self.chunk
        return (self.chunks, *last) if self.chunks else last

    def inward(self, tensor: Tensor) -> Tensor:
        """Return `tensor` (shape `shape`) as the chain sees it."""
        if self.chunks:
            tensor = torch.stack(torch.chunk(tensor, self.chunks, self.dim))
        return tensor.reshape(self.inner) if self.matrix else tensor

    def outward(self, tensor: Tensor) -> Tensor:
        """Return the chain's result (shape `inner`) in the tensor's own shape."""
        if self.chunks:
            tensor = tensor.reshape((self.chunks, *self.chunk))
            return torch.cat(torch.unbind(tensor), self.dim)
        return tensor.reshape(self.shape) if self.matrix else tensor


@functools.lru_cache(maxsize=1024)
def layout_of(
    shape: tuple[int, ...],
    per: tuple[int, int] | None = None,
    reshape: tuple[str | int, ...] | None = None,
) -> Layout:
    """Resolve `per` and `reshape` of a rule against one shape.

    Arguments:
        shape: the tensor's shape.
        per: ``(dim, chunks)``.
        reshape: numbers, at most one -1, and the words ``out`` (size of the first dimension) and ``in`` (the second).

    Raises:
        ValueError: the shape cannot be cut or reshaped so.
    """
    layout = Layout(shape)
    if per is not None:
        dim, chunks = per
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"`per` cuts dimension {dim}, and the tensor has shape {list(shape)}")
        dim %= len(shape)
        if chunks < 1 or shape[dim] % chunks:
            raise ValueError(f"`per` wants {chunks} equal chunks of dimension {dim}, which has size {shape[dim]}")
        layout = Layout(shape, dim, chunks)
    if reshape is None:
        return layout
    matrix = _resolve_reshape(layout.chunk, reshape)
    return Layout(shape, layout.dim, layout.chunks, matrix)


def _resolve_reshape(shape: tuple[int, ...], wanted: tuple[str | int, ...]) -> tuple[int, ...]:
    words = {"out": 0, "in": 1}
    sizes: list[int] = []
    for size in wanted:
        if isinstance(size, str) and words[size] >= len(shape):
            raise ValueError(f"`reshape` names {size!r}, and the tensor has shape {list(shape)}")
        sizes.append(shape[words[size]] if isinstance(size, str) else size)
    total = math.prod(shape)
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        if rest == 0 or total % rest:
            raise ValueError(f"`reshape` {list(wanted)} does not divide a tensor of shape {list(shape)}")
        sizes[sizes.index(-1)] = total // rest
    if math.prod(sizes) != total:
        raise ValueError(f"`reshape` {list(wanted)} does not fit a tensor of shape {list(shape)}")
    return tuple(sizes)
