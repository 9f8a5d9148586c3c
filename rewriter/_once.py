"""evaluate_once: one evaluation and one backward of every chain for many forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rewriter._given import check_model
from rewriter.context._once import Once
from rewriter.errors import RewriterError
from rewriter.sites import Site


@contextlib.contextmanager
def evaluate_once(model: nn.Module) -> Iterator[None]:
    """Evaluate every chain of `model` once, and differentiate it once, for all forwards and backwards in the block.

    >>> import torch, rewriter
    >>> spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
    >>> model = rewriter.rewrite(torch.nn.Sequential(torch.nn.Linear(3, 3)), spec)
    >>> with evaluate_once(model):
    ...     for micro_batch in torch.randn(8, 5, 3):
    ...         model(micro_batch).sum().backward()
    >>> [parameter.grad is not None for parameter in model.parameters()]
    [True, True]

    The gradients of the stored tensors arrive when the block ends. Hooks on them run then, once, with the sum.
    Clipping, unscaling and the optimizer's step come after the block. Until then their ``.grad`` is as it was, or
    zeros where there was none. Gradients of other parameters arrive in each backward.
    Inside a block that is already open, nothing changes: the outer one ends it. An exception that leaves the block
    drops what was gathered. Each thread has its own block. A chain whose policy is ``never``, and one over tensors
    that `functional_call` puts in, is evaluated as outside; so is a model that torch.compile has compiled.

    Inside, `torch.autograd.grad` with respect to originals gives their gradients at once. It is an error for originals
    with gradient hooks, and under DistributedDataParallel.

    With DistributedDataParallel give the wrapped model, and run all forwards but the last under ``no_sync()``, as for
    every accumulation of gradients. The reduction completes at the end of the block. It also does when an exception
    ends the block: the other processes wait for it.

    Arguments:
        model: a rewritten model, or one that contains rewritten models.

    Raises:
        RewriterError: a backward has ``create_graph=True`` through a chain. Or a tensor that was evaluated has changed
            (an optimizer's step, ``.to()``), or its gradient was reset (``zero_grad()``) after a backward. Or the model
            is a DistributedDataParallel that looks for unused parameters: it would take the stored tensors for some.
    """
    check_model(model, "evaluate_once", programs=False, wrapped=True)
    _refuse(model)
    once = Once(distributed=any(isinstance(module, DistributedDataParallel) for module in model.modules()))
    added: list[Site] = []
    try:
        for site in model.modules():
            if isinstance(site, Site) and site.policy.once is None:
                once.add(site)
                site.policy.begin(once)
                added.append(site)
        yield
    except BaseException as problem:
        if isinstance(problem, Exception) and any(map(_reduces, model.modules())):
            with contextlib.suppress(Exception):
                once.finish()
        once.leave()
        raise
    finally:
        for site in added:
            site.policy.end()
    try:
        once.finish()
    finally:
        once.leave()


def _reduces(module: nn.Module) -> bool:
    """Whether other processes may be waiting for this one's gradients, which a backward would have sent by now."""
    return isinstance(module, DistributedDataParallel) and module.require_backward_grad_sync


def _refuse(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and (module.find_unused_parameters or module.static_graph):
            option = "find_unused_parameters" if module.find_unused_parameters else "static_graph"
            raise RewriterError(
                f"evaluate_once sends gradients to the stored tensors after the last backward, and "
                f"DistributedDataParallel with {option}=True takes them for unused before; build it without"
            )
