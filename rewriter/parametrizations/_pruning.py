"""Pruning: masks chosen by torch's criteria from the weight as it is when the mask is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils import prune

from rewriter.errors import RewriterError
from rewriter.parametrizations._mask import FixedMask
from rewriter.parametrizations._registry import register

_COST = "one multiplication per entry; choosing the mask once: a partial sort"


def kept(method: Callable[..., Any], scores: Tensor, *arguments: Any) -> Tensor:
    """Return the mask, 0 or 1, that torch's pruning `method` with these arguments computes from `scores`.

    Raises:
        RewriterError: the method refuses its arguments or the shape.
    """
    try:
        chosen: Tensor = method(*arguments).compute_mask(scores.detach(), torch.ones_like(scores))
    except (ValueError, TypeError, IndexError) as refusal:
        raise RewriterError(f"cannot prune a weight of shape {list(scores.shape)}: {refusal}") from refusal
    return chosen


@register("random_unstructured")
class RandomUnstructured(FixedMask):
    """Prune entries at random.

    >>> import torch
    >>> pruned = RandomUnstructured(amount=3, weight=torch.ones(2, 4))(torch.ones(2, 4))
    >>> pruned.count_nonzero().item()
    5

    Arguments:
        amount: how many entries (int), or which part of them, in [0, 1] (float), become zero.
        weight: the tensor to prune, filled in by the site.
    """

    cost = _COST
    reference = "torch.nn.utils.prune.random_unstructured"

    def __init__(self, amount: int | float, *, weight: Tensor) -> None:
        super().__init__(kept(prune.RandomUnstructured, weight, amount))


@register("l1_unstructured")
class L1Unstructured(FixedMask):
    """Prune the entries of smallest magnitude.

    >>> import torch
    >>> weight = torch.tensor([[0.1, -2.0], [3.0, -0.2]])
    >>> L1Unstructured(amount=0.5, weight=weight)(weight)
    tensor([[ 0., -2.],
            [ 3., -0.]])

    Arguments:
        amount: how many entries (int), or which part of them, in [0, 1] (float), become zero.
        importance_scores: from Python, a tensor of the weight's shape whose magnitudes are compared instead.
        weight: the tensor to prune, filled in by the site.
    """

    cost = _COST
    reference = "torch.nn.utils.prune.l1_unstructured"

    def __init__(self, amount: int | float, importance_scores: Tensor | None = None, *, weight: Tensor) -> None:
        scores = weight if importance_scores is None else importance_scores
        super().__init__(kept(prune.L1Unstructured, scores, amount), weight)


@register("random_structured")
class RandomStructured(FixedMask):
    """Prune whole channels at random.

    >>> import torch
    >>> pruned = RandomStructured(amount=1, dim=0, weight=torch.ones(3, 2))(torch.ones(3, 2))
    >>> sorted(pruned.sum(dim=1).tolist())
    [0.0, 2.0, 2.0]

    Arguments:
        amount: how many channels (int), or which part of them, in [0, 1] (float), become zero.
        dim: the dimension that counts the channels.
        weight: the tensor to prune, of two or more dimensions, filled in by the site.
    """

    cost = _COST
    reference = "torch.nn.utils.prune.random_structured"

    def __init__(self, amount: int | float, dim: int = -1, *, weight: Tensor) -> None:
        super().__init__(kept(prune.RandomStructured, weight, amount, dim))


@register("ln_structured")
class LnStructured(FixedMask):
    """Prune the channels of smallest Lⁿ norm.

    >>> import torch
    >>> weight = torch.tensor([[1.0, 1.0], [0.1, 0.1], [2.0, 0.0]])
    >>> LnStructured(amount=1, n=2, dim=0, weight=weight)(weight)
    tensor([[1., 1.],
            [0., 0.],
            [2., 0.]])

    Arguments:
        amount: how many channels (int), or which part of them, in [0, 1] (float), become zero.
        n: the norm: a number, ``inf``, ``-inf``, ``fro`` or ``nuc``.
        dim: the dimension that counts the channels.
        importance_scores: from Python, a tensor of the weight's shape whose norms are compared instead.
        weight: the tensor to prune, of two or more dimensions, filled in by the site.
    """

    cost = _COST
    reference = "torch.nn.utils.prune.ln_structured"

    def __init__(
        self,
        amount: int | float,
        n: int | float | Literal["inf", "-inf", "fro", "nuc"] = 2,
        dim: int = -1,
        importance_scores: Tensor | None = None,
        *,
        weight: Tensor,
    ) -> None:
        scores = weight if importance_scores is None else importance_scores
        norm = float(n) if n in ("inf", "-inf") else n
        super().__init__(kept(prune.LnStructured, scores, amount, norm, dim), weight)


class _Global(FixedMask):
    cost = _COST
    reference = "torch.nn.utils.prune.global_unstructured"
    criterion: ClassVar[Callable[..., Any]]

    def __init__(self, amount: int | float, count: int | None = None, *, weight: Tensor) -> None:
        super().__init__(kept(self.criterion, weight, amount if count is None else count))

    @classmethod
    def plan_sites(
        cls, weights: Sequence[Tensor], names: Sequence[str] = (), *, amount: int | float
    ) -> list[dict[str, Any]]:
        """Return for each of a rule's tensors how many of its entries the common budget takes."""
        if any(weight.is_meta for weight in weights):
            return [{"count": 0} for _ in weights]
        entries = [weight.detach().flatten().to(weights[0].device) for weight in weights]
        chosen = torch.split(kept(cls.criterion, torch.cat(entries), amount), [len(part) for part in entries])
        return [{"count": int((part == 0).sum())} for part in chosen]


@register("global_l1")
class GlobalL1(_Global):
    """Prune the entries of smallest magnitude among all tensors of a rule, under one budget.

    >>> import torch
    >>> first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2])
    >>> GlobalL1.plan_sites([first, second], amount=3)
    [{'count': 1}, {'count': 2}]

    Arguments:
        amount: how many entries of all the rule's tensors together (int), or which part of them, in [0, 1]
            (float), become zero.
        count: how many of them lie in this tensor; filled in for all sites by `plan_sites`. A tensor
            on its own prunes `amount`.
        weight: the tensor to prune, filled in by the site.
    """

    criterion = prune.L1Unstructured


@register("global_random")
class GlobalRandom(_Global):
    """Prune entries at random among all tensors of a rule, under one budget.

    >>> import torch
    >>> counts = GlobalRandom.plan_sites([torch.ones(3), torch.ones(9)], amount=0.5)
    >>> sum(site["count"] for site in counts)
    6

    Arguments:
        amount: how many entries of all the rule's tensors together (int), or which part of them, in [0, 1]
            (float), become zero.
        count: how many of them lie in this tensor; filled in for all sites by `plan_sites`. A tensor
            on its own prunes `amount`.
        weight: the tensor to prune, filled in by the site.
    """

    criterion = prune.RandomUnstructured
