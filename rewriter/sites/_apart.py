"""Weights that a linear layer can use without making them: a base and a low-rank change act one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rewriter.context._tracers import plain_autograd
from rewriter.parametrizations._adapters import Lora

if TYPE_CHECKING:
    from rewriter.sites._site import Site


def may_be_apart(site: Site) -> bool:
    """Whether the chain of `site` is one LoRA step of low rank over a matrix, evaluated once in each forward."""
    steps, spec = site._modules, site.spec
    if len(steps) != 1 or type(steps.get("0")) is not Lora or len(spec.members[0].shape) != 2:
        return False
    return spec.simple and spec.cache == "forward" and _pays(*spec.members[0].shape, steps["0"].r)  # type: ignore[arg-type, union-attr]


def _pays(rows: int, columns: int, rank: int) -> bool:
    """Whether three small products cost less than the gradient of the whole weight, which they save."""
    return 3 * rank * (rows + columns) <= rows * columns


def parts_of(site: Site) -> tuple[Tensor, Lora] | None:
    """Return the base and the step of a site that `may_be_apart`, if a forward for training runs; else None.

    The answer is the same when activation checkpointing runs the forward again.
    """
    step, base = site._modules["0"], site._parameters.get("original")
    if type(step) is not Lora or type(base) is not nn.Parameter or base.requires_grad:
        return None
    if not step.lora_B.requires_grad or (step.random and step.training) or not torch.is_grad_enabled():
        return None
    if not plain_autograd() or not site.policy.evaluates(site) or _hooked(site) or _hooked(step):
        return None
    return base, step


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
