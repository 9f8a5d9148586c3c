"""Slices of given norms, by the kernels that torch has for weight normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rewriter.catalog._maps._eager import at_hand

# The overload by name: choosing it anew at each call takes longer than the kernel.
_backward = torch.ops.aten._weight_norm_interface_backward.default


def scaled_slices(g: Tensor, v: Tensor, dim: int | None) -> Tensor | None:
    """Return v with the norms g in its slices along `dim`, zero where v is, or None where the kernels lack the case.

    They exist for real tensors and have no forward-mode derivative. They are fast for the first dimension and for
    matrices; other dimensions are moved to the front.
    """
    if not (
        at_hand(v)
        and v.dtype == g.dtype
        and v.is_floating_point()
        and v.is_contiguous()
        and g.is_contiguous()
        and forward_ad._current_level < 0
    ):
        return None
    if dim is None:
        return None if g.numel() != 1 else _scaled(g.view(1, 1), v.view(1, -1), 0).view(v.shape)
    ndim = v.dim()
    dim %= ndim
    if ndim < 2 or g.dim() != ndim or not g.numel() == g.size(dim) == v.size(dim):
        return None
    if dim == 0 or (dim == 1 and ndim == 2):
        return _scaled(g, v, dim)
    moved = _scaled(g.transpose(0, dim).contiguous(), v.transpose(0, dim).contiguous(), 0)
    return moved.transpose(0, dim).contiguous()


def _scaled(g: Tensor, v: Tensor, dim: int) -> Tensor:
    value: Tensor = _Scaled.apply(g, v, dim)  # type: ignore[no-untyped-call]
    return value


class _Scaled(torch.autograd.Function):
    """torch's kernels, except that zero slices have no NaN and that the second derivative sees the norms."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, v: Tensor, dim: int) -> Tensor:
        value, norm = torch._weight_norm_interface(v, g, dim)
        if norm.min().item() == 0:
            norm = norm.masked_fill(norm == 0, 1.0)
            value = v * (g / norm)
        ctx.save_for_backward(g, v, norm)
        ctx.dim = dim
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        g, v, norm = ctx.saved_tensors
        if not torch.is_grad_enabled():
            to_v, to_g = _backward(gradient.contiguous(), v, g, norm, ctx.dim)
            return to_g, to_v, None
        others = [dim for dim in range(v.dim()) if dim != ctx.dim]
        norm = torch.linalg.vector_norm(v, dim=others, keepdim=True)
        norm = torch.where(norm == 0, torch.ones_like(norm), norm)
        along = (gradient * v).sum(others, keepdim=True) / norm
        return along, (g / norm) * (gradient - v * (along / norm)), None
