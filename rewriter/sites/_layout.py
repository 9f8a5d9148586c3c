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
        only: which chunks the chain works on; the rest is stored as it is. Empty for all.
    """

    shape: tuple[int, ...]
    dim: int = 0
    chunks: int = 0
    matrix: tuple[int, ...] = ()
    only: tuple[int, ...] = ()

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
        return (len(self.only) or self.chunks, *last) if self.chunks else last

    @property
    def part(self) -> Layout:
        """The layout of the chunks that the chain works on, as one tensor."""
        if not self.only:
            return self
        size = self.shape[self.dim] // self.chunks * len(self.only)
        return Layout(
            (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :]), self.dim, len(self.only), self.matrix
        )

    def inward(self, tensor: Tensor) -> Tensor:
        """Return `tensor` (shape `shape`) as the chain sees it."""
        if self.chunks:
            chunks = torch.chunk(tensor, self.chunks, self.dim)
            tensor = torch.stack([chunks[index] for index in self.only] if self.only else chunks)
        return tensor.reshape(self.inner) if self.matrix else tensor

    def rest(self, tensor: Tensor) -> Tensor:
        """Return the chunks of `tensor` that the chain does not work on, as one tensor."""
        chunks = torch.chunk(tensor, self.chunks, self.dim)
        return torch.cat([chunks[index] for index in range(self.chunks) if index not in self.only], self.dim)

    def join(self, part: Tensor, rest: Tensor) -> Tensor:
        """Return the tensor of which `part` has the chunks that the chain works on, and `rest` the others."""
        inside = torch.chunk(part, len(self.only), self.dim)
        outside = torch.chunk(rest, self.chunks - len(self.only), self.dim)
        chunks, passed = [], 0
        for index in range(self.chunks):
            if index in self.only:
                chunks.append(inside[self.only.index(index)])
                passed += 1
            else:
                chunks.append(outside[index - passed])
        return torch.cat(chunks, self.dim)

    def outward(self, tensor: Tensor, rest: Tensor | None = None) -> Tensor:
        """Return the chain's result (shape `inner`) in the tensor's own shape; `rest` has the chunks of no chain."""
        if self.only:
            assert rest is not None
            return self.join(self.part.outward(tensor), rest)
        if self.chunks:
            tensor = tensor.reshape((self.chunks, *self.chunk))
            return torch.cat(torch.unbind(tensor), self.dim)
        return tensor.reshape(self.shape) if self.matrix else tensor


@functools.lru_cache(maxsize=1024)
def layout_of(
    shape: tuple[int, ...],
    per: tuple[int, int, tuple[int, ...]] | None = None,
    reshape: tuple[str | int, ...] | None = None,
) -> Layout:
    """Resolve `per` and `reshape` of a rule against one shape.

    Arguments:
        shape: the tensor's shape.
        per: ``(dim, chunks, only)``.
        reshape: numbers, at most one -1, and the words ``out`` (size of the first dimension) and ``in`` (the second).

    Raises:
        ValueError: the shape cannot be cut or reshaped so.
    """
    layout = Layout(shape)
    if per is not None:
        dim, chunks, only = per
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"`per` cuts dimension {dim}, and the tensor has shape {list(shape)}")
        dim %= len(shape)
        if chunks < 1 or shape[dim] % chunks:
            raise ValueError(f"`per` wants {chunks} equal chunks of dimension {dim}, which has size {shape[dim]}")
        layout = Layout(shape, dim, chunks, only=only)
    if reshape is None:
        return layout
    matrix = _resolve_reshape(layout.chunk, reshape)
    return Layout(shape, layout.dim, layout.chunks, matrix, layout.only)


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
