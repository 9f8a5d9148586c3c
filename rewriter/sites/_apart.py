"""Weights that a linear layer can use without making them: a base and a low-rank change act one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from rewriter.context._fingerprint import PLAIN
from rewriter.context._tracers import plain_autograd
from rewriter.parametrizations._adapters import Lora

if TYPE_CHECKING:
    from rewriter.sites._site import Site

SMALL = 128 * 128
"""Entries of a weight: with so many or less, the calls cost more than they save."""


def may_be_apart(site: Site) -> bool:
    """Whether the chain ends in a LoRA step of low rank over a matrix, and nothing before it is trained."""
    step, spec = _last(site), site.spec
    if type(step) is not Lora or len(spec.members[0].shape) != 2 or site.hoisted != len(spec.chain) - 1:
        return False
    return spec.simple and spec.cache == "forward" and _pays(*spec.members[0].shape, step.r)


def _last(site: Site) -> nn.Module | None:
    return site._modules.get(str(len(site.spec.chain) - 1))


def _pays(rows: int, columns: int, rank: int) -> bool:
    """Whether three small products cost less than the gradient of the whole weight, which they save.

    Measured on one thread: the step of a transformer of width 64 takes 1.05 of the time, of width 192 0.86.
    """
    return 3 * rank * (rows + columns) <= rows * columns > SMALL


def parts_of(site: Site) -> tuple[Tensor, Lora] | None:
    """Return the base and the step of a site that `may_be_apart`, if a forward for training runs; else None.

    The answer is the same when activation checkpointing runs the forward again.
    """
    step = _last(site)
    if type(step) is not Lora or not step.lora_B.requires_grad or (step.random and step.training):
        return None
    if not plain_autograd() or not site.policy.evaluates() or _hooked(site) or _hooked(step):
        return None
    base = site.hoisted_value() if site.hoisted else site._parameters.get("original")
    return None if type(base) not in PLAIN or base.requires_grad else (base, step)  # type: ignore[union-attr, return-value]


def _hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__  # as accelerate hooks modules
