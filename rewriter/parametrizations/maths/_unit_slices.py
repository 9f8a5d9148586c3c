"""Slices of given norms, by the kernels that torch has for weight normalization."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rewriter._torch import weight_norm_with_norm
from rewriter.parametrizations.maths._eager import executed_now

_KINDS = frozenset({Tensor, nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float64})


def scaled_slices(g: Tensor, v: Tensor, dim: int | None) -> Tensor | None:
    """Return v with the norms g in its slices along `dim`, zero where v is, or None where the kernels lack the case.

    They exist for real tensors and have no forward-mode derivative. They are fast for the first dimension and for
    matrices; other dimensions are moved to the front.
    """
    # The common case comes first: between the kernels of a training step every test costs.
    if type(v) not in _KINDS or type(g) not in _KINDS or v.dtype is not g.dtype or v.dtype not in _DTYPES:
        return None
    if not (v.is_cpu and v.is_contiguous() and g.is_contiguous() and executed_now()):
        return None
    norms, sizes = g.shape, v.shape
    if 0 in sizes:
        return None
    if dim is None:
        return _scaled(g.view(1, 1), v.view(1, -1), 0).view(sizes) if g.numel() == 1 else None
    ndim = len(sizes)
    dim %= ndim
    if ndim < 2 or len(norms) != ndim or not g.numel() == norms[dim] == sizes[dim]:
        return None
    if dim == 0 or (dim == 1 and ndim == 2):
        return _scaled(g, v, dim)
    moved = _scaled(g.transpose(0, dim).contiguous(), v.transpose(0, dim).contiguous(), 0)
    return moved.transpose(0, dim).contiguous()


def _scaled(g: Tensor, v: Tensor, dim: int) -> Tensor:
    value, norm = weight_norm_with_norm(v, g, dim)
    if norm.min().item() == 0:  # the kernel has divided by it
        zero = norm == 0
        norm = _norm(v.masked_fill(zero, 1.0), dim)
        return v * torch.where(zero, g, g / norm)
    node = value.grad_fn
    if node is not None:
        node.register_hook(partial(_corrected, g, v, dim))
    return value


def _corrected(
    g: Tensor, v: Tensor, dim: int, gradients: Sequence[Tensor | None], outputs: Sequence[Tensor | None]
) -> Sequence[Tensor | None] | None:
    """Return differentiable gradients, if they are to be: torch takes the norms in them for constants."""
    if not torch.is_grad_enabled():
        return None
    gradient = outputs[0]
    if gradient is None:
        return None
    norm = _norm(v, dim)
    along = (gradient * v).sum([index for index in range(v.dim()) if index != dim], keepdim=True) / norm
    exact = ((g / norm) * (gradient - v * (along / norm)), along)
    return tuple(None if given is None else new for given, new in zip(gradients, exact, strict=True))


def _norm(v: Tensor, dim: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(v, dim=[index for index in range(v.dim()) if index != dim], keepdim=True)
    return norm
