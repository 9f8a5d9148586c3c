"""Pruning: masks that are computed once from the weight, by torch's criteria and by patterns for hardware."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils import prune

from rewriter.errors import RewriterError
from rewriter.parametrizations._mask import FixedMask


def selected(method: Callable[..., Any], scores: Tensor, remaining: Tensor | None, *arguments: Any) -> Tensor:
    """Return the mask, 0 or 1, that torch's pruning `method` with these arguments computes from `scores`.

    Arguments:
        method: a class of ``torch.nn.utils.prune``.
        scores: the tensor that is ranked.
        remaining: the mask of earlier steps. The method ranks the entries or channels that it leaves, as
            ``torch.nn.utils.prune.PruningContainer`` does.
        arguments: those of the method.

    Raises:
        RewriterError: the method refuses its arguments or the shape.
    """
    scores, ones = scores.detach(), torch.ones_like(scores)
    try:
        pruning = method(*arguments)
        if remaining is None or remaining.is_meta:
            chosen: Tensor = pruning.compute_mask(scores, ones)
        else:
            container = prune.PruningContainer()
            container._tensor_name = pruning._tensor_name = "weight"
            container.add_pruning_method(pruning)
            chosen = container.compute_mask(  # type: ignore[no-untyped-call]
                scores, remaining.expand_as(scores).to(ones)
            )
    except (ValueError, TypeError, IndexError) as refusal:
        raise RewriterError(f"cannot prune a weight of shape {list(scores.shape)}: {refusal}") from refusal
    return chosen != 0


class _Pruning(FixedMask):
    cost = "one multiplication per entry; choosing the mask once: a partial sort"


class RandomUnstructured(_Pruning, name="random_unstructured"):
    """Prune entries at random.

    >>> import torch
    >>> pruned = RandomUnstructured(amount=3, weight=torch.ones(2, 4))(torch.ones(2, 4))
    >>> pruned.count_nonzero().item()
    5

    Arguments:
        amount: how many of the remaining entries (int), or which part of them, in [0, 1] (float), become zero.
    """

    reference = "torch.nn.utils.prune.random_unstructured"

    amount: int | float

    @classmethod
    def choose(cls, weight: Tensor, remaining: Tensor | None, given: Any) -> Tensor:
        return selected(prune.RandomUnstructured, weight, remaining, given.amount)


class L1Unstructured(_Pruning, name="l1_unstructured"):
    """Prune the entries of smallest magnitude.

    >>> import torch
    >>> weight = torch.tensor([[0.1, -2.0], [3.0, -0.2]])
    >>> L1Unstructured(amount=0.5, weight=weight)(weight)
    tensor([[ 0., -2.],
            [ 3., -0.]])

    Arguments:
        amount: how many of the remaining entries (int), or which part of them, in [0, 1] (float), become zero.
        importance_scores: from Python, a tensor of the weight's shape whose magnitudes are compared instead.
    """

    reference = "torch.nn.utils.prune.l1_unstructured"

    amount: int | float
    importance_scores: Tensor | None = None

    @classmethod
    def choose(cls, weight: Tensor, remaining: Tensor | None, given: Any) -> Tensor:
        scores = weight if given.importance_scores is None else given.importance_scores
        return selected(prune.L1Unstructured, scores, remaining, given.amount)


class RandomStructured(_Pruning, name="random_structured"):
    """Prune whole channels at random.

    >>> import torch
    >>> pruned = RandomStructured(amount=1, dim=0, weight=torch.ones(3, 2))(torch.ones(3, 2))
    >>> sorted(pruned.sum(dim=1).tolist())
    [0.0, 2.0, 2.0]

    Arguments:
        amount: how many of the remaining channels (int), or which part of them, in [0, 1] (float), become zero.
        dim: the dimension that counts the channels.
    """

    reference = "torch.nn.utils.prune.random_structured"

    amount: int | float
    dim: int = -1

    @classmethod
    def choose(cls, weight: Tensor, remaining: Tensor | None, given: Any) -> Tensor:
        return selected(prune.RandomStructured, weight, remaining, given.amount, given.dim)


class LnStructured(_Pruning, name="ln_structured"):
    """Prune the channels of smallest Lⁿ norm.

    >>> import torch
    >>> weight = torch.tensor([[1.0, 1.0], [0.1, 0.1], [2.0, 0.0]])
    >>> LnStructured(amount=1, n=2, dim=0, weight=weight)(weight)
    tensor([[1., 1.],
            [0., 0.],
            [2., 0.]])

    Arguments:
        amount: how many of the remaining channels (int), or which part of them, in [0, 1] (float), become zero.
        n: the norm: a number, ``inf``, ``-inf``, ``fro`` or ``nuc``.
        dim: the dimension that counts the channels.
        importance_scores: from Python, a tensor of the weight's shape whose norms are compared instead.
    """

    reference = "torch.nn.utils.prune.ln_structured"

    amount: int | float
    n: int | float | Literal["inf", "-inf", "fro", "nuc"] = 2
    dim: int = -1
    importance_scores: Tensor | None = None

    @classmethod
    def choose(cls, weight: Tensor, remaining: Tensor | None, given: Any) -> Tensor:
        scores = weight if given.importance_scores is None else given.importance_scores
        norm = float(given.n) if given.n in ("inf", "-inf") else given.n
        return selected(prune.LnStructured, scores, remaining, given.amount, norm, given.dim)


class _Global(_Pruning):
    reference = "torch.nn.utils.prune.global_unstructured"
    plans_alone = True
    one_by_one = False
    criterion: ClassVar[Callable[..., Any]]

    amount: int | float

    @classmethod
    def choose(cls, weight: Tensor, remaining: Tensor | None, given: Any) -> Tensor:
        return selected(cls.criterion, weight, remaining, given.amount)

    @classmethod
    def plan_sites(
        cls,
        weights: Sequence[Tensor],
        names: Sequence[str] = (),
        remaining: Sequence[Tensor | None] = (),
        **arguments: Any,
    ) -> list[dict[str, Any]]:
        """Return the masks of a rule's tensors, chosen as one mask for all their entries."""
        if any(weight.is_meta for weight in weights):
            return [{} for _ in weights]
        place = weights[0].device
        scores = cls.scores(weights, names, **arguments)
        entries = torch.cat([score.detach().flatten().to(place) for score in scores])
        left = None
        if any(mask is not None for mask in remaining):
            masks = [
                torch.ones_like(weight) if mask is None else mask.expand_as(weight).to(weight)
                for weight, mask in zip(weights, remaining, strict=True)
            ]
            left = torch.cat([mask.flatten().to(place) for mask in masks])
        chosen = torch.split(cls.choose(entries, left, cls.given(**arguments)), [weight.numel() for weight in weights])
        return [
            {"chosen_mask": part.view(weight.shape).to(weight.device)}
            for part, weight in zip(chosen, weights, strict=True)
        ]

    @classmethod
    def scores(cls, weights: Sequence[Tensor], names: Sequence[str], **arguments: Any) -> Sequence[Tensor]:
        """Return the tensors whose entries are compared."""
        return weights


class GlobalL1(_Global, name="global_l1"):
    """Prune the entries of smallest magnitude among all tensors of a rule, under one budget.

    >>> import torch
    >>> first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2])
    >>> [site["chosen_mask"].tolist() for site in GlobalL1.plan_sites([first, second], amount=3)]
    [[False, True, True], [False, False]]

    Arguments:
        amount: how many remaining entries of all the rule's tensors together (int), or which part of them, in [0, 1]
            (float), become zero. A tensor on its own prunes `amount`.
        importance_scores: from Python, tensors by the names of those whose entries they stand for: their magnitudes are
            compared instead.
    """

    criterion = prune.L1Unstructured
    importance_scores: Mapping[str, Tensor] | None = None

    @classmethod
    def scores(cls, weights: Sequence[Tensor], names: Sequence[str], **arguments: Any) -> Sequence[Tensor]:
        given = arguments.get("importance_scores") or {}
        for name, score in given.items():
            shapes = [list(weight.shape) for weight, own in zip(weights, names, strict=True) if own == name]
            if list(score.shape) not in shapes or len(shapes) > 1:
                wanted = f"{shapes} are wanted" if shapes else f"the rule has {', '.join(names)}"
                raise RewriterError(f"global_l1: importance_scores of {name} have shape {list(score.shape)}; {wanted}")
        return [given.get(name, weight) for name, weight in zip(names or [""] * len(weights), weights, strict=True)]


class GlobalRandom(_Global, name="global_random"):
    """Prune entries at random among all tensors of a rule, under one budget.

    >>> import torch
    >>> sites = GlobalRandom.plan_sites([torch.ones(3), torch.ones(9)], amount=0.5)
    >>> sum(int(site["chosen_mask"].sum()) for site in sites)
    6

    Arguments:
        amount: how many remaining entries of all the rule's tensors together (int), or which part of them, in [0, 1]
            (float), become zero. A tensor on its own prunes `amount`.
    """

    criterion = prune.RandomUnstructured


class NM(FixedMask, name="n_m"):
    """Keep the `n` entries of largest magnitude in every group of `m` along a dimension (2:4 by default).

    >>> import torch
    >>> weight = torch.tensor([[1.0, -4.0, 3.0, 2.0]])
    >>> NM(weight=weight)(weight)
    tensor([[ 0., -4.,  3.,  0.]])

    Arguments:
        n: entries that stay in each group.
        m: size of a group; divides the dimension.
        dim: the dimension that is cut into groups.
    """

    guarantee = "at most n of every m entries along dim are not zero"
    reference = "Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv:2104.08378"

    n: int = 2
    m: int = 4
    dim: int = -1

    @classmethod
    def choose(cls, weight: Tensor, remaining: Tensor | None, given: Any) -> Tensor:
        n, m, dim = given.n, given.m, given.dim
        if not 0 <= n <= m or m < 1:
            raise RewriterError(f"n_m keeps n of m entries, with 0 <= n <= m: n={n}, m={m}")
        if not -weight.dim() <= dim < weight.dim() or weight.shape[dim] % m:
            raise RewriterError(f"{m} does not divide dimension {dim} of a weight of shape {list(weight.shape)}")
        scores = weight.detach().abs()
        if remaining is not None:
            scores = torch.where(remaining.expand_as(scores) != 0, scores, -1.0)
        groups = torch.unflatten(scores.movedim(dim, -1), -1, (-1, m))
        largest = groups.topk(n, dim=-1).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, largest, True)
        return mask.flatten(-2).movedim(-1, dim)


class BlockSparse(FixedMask, name="block_sparse"):
    """Prune the blocks of smallest Lⁿ norm of a matrix.

    >>> import torch
    >>> weight = torch.tensor([[1.0, 1.0, 0.1, 0.1], [1.0, 1.0, 0.1, 0.1]])
    >>> BlockSparse(amount=1, block_shape=[2, 2], weight=weight)(weight)
    tensor([[1., 1., 0., 0.],
            [1., 1., 0., 0.]])

    Arguments:
        amount: how many of the remaining blocks (int), or which part of them, in [0, 1] (float), become zero.
        block_shape: rows and columns of a block; they divide the last two dimensions.
        n: the norm that ranks the blocks.
    """

    guarantee = "pruned blocks are exactly zero"
    reference = "Narang, Undersander, Diamos 2017, Block-Sparse Recurrent Neural Networks, arXiv:1711.02782"

    amount: int | float
    block_shape: Sequence[int]
    n: float = 2.0

    @classmethod
    def choose(cls, weight: Tensor, remaining: Tensor | None, given: Any) -> Tensor:
        block_shape = given.block_shape
        if len(block_shape) != 2 or weight.dim() < 2 or min(block_shape) < 1:
            raise RewriterError(f"block_shape is [rows, columns] for a matrix, not {list(block_shape)}")
        rows, columns = block_shape
        if weight.shape[-2] % rows or weight.shape[-1] % columns:
            raise RewriterError(f"blocks of {rows}x{columns} do not tile a weight of shape {list(weight.shape)}")
        left = torch.ones_like(weight) if remaining is None else (remaining != 0).expand_as(weight).to(weight)
        blocks = [
            torch.unflatten(torch.unflatten(tensor, -2, (-1, rows)), -1, (-1, columns))
            for tensor in (weight.detach() * left, left)
        ]
        norms = torch.linalg.vector_norm(blocks[0], given.n, dim=(-3, -1))
        whole = None if remaining is None else blocks[1].amax((-3, -1))
        mask = selected(prune.L1Unstructured, norms, whole, given.amount)
        return mask.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
