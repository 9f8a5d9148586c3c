from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from rewriter import bake, rewrite
from rewriter.errors import RewriterError
from rewriter.parametrizations._mask import Mask
from rewriter.parametrizations._registry import construct, find
from tests.rules import one_rule

matrices = st.lists(st.integers(1, 6), min_size=2, max_size=4)


def make(name: str, weight: torch.Tensor, **arguments: Any) -> Any:
    return construct(find(name), weight, arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("random_unstructured", {}),
        ("l1_unstructured", {}),
        ("random_structured", {"dim": 0}),
        ("random_structured", {"dim": 1}),
        ("ln_structured", {"n": 2, "dim": 0}),
        ("ln_structured", {"n": 1, "dim": -1}),
        ("ln_structured", {"n": float("inf"), "dim": 1}),
    ],
)
@given(shape=matrices, amount=st.floats(0, 1) | st.just(1), seed=st.integers(0, 99))
def test_equals_torch(name: str, arguments: dict[str, Any], shape: list[int], amount: float, seed: int) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape))
    weight = module.weight.detach().clone()
    torch.manual_seed(seed)
    ours = make(name, weight, amount=amount, **arguments)
    torch.manual_seed(seed)
    getattr(prune, name)(module, "weight", amount=amount, **arguments)
    assert torch.equal(ours(weight), module.weight)
    assert torch.equal(ours.mask.float().expand(shape), module.weight_mask)


@pytest.mark.parametrize("name", ["l1_unstructured", "ln_structured"])
def test_importance_scores_rank_the_entries(name: str) -> None:
    module = nn.Linear(5, 4)
    weight, scores = module.weight.detach().clone(), torch.randn(4, 5)
    extra = {"n": 2, "dim": 0} if name == "ln_structured" else {}
    ours = make(name, weight, amount=2, importance_scores=scores, **extra)
    getattr(prune, name)(module, "weight", amount=2, importance_scores=scores, **extra)
    assert torch.equal(ours(weight), module.weight)


@pytest.mark.parametrize(("name", "method"), [("global_l1", "L1"), ("global_random", "Random")])
@given(shapes=st.lists(matrices, min_size=1, max_size=3), amount=st.floats(0, 1), seed=st.integers(0, 9))
def test_a_global_budget_takes_what_torch_takes(
    name: str, method: str, shapes: list[list[int]], amount: float, seed: int
) -> None:
    modules = [nn.Module() for _ in shapes]
    for module, shape in zip(modules, shapes, strict=True):
        module.weight = nn.Parameter(torch.randn(shape))
    weights = [module.weight.detach().clone() for module in modules]
    torch.manual_seed(seed)
    plan = find(name).plan_sites(weights, amount=amount)
    torch.manual_seed(seed)
    prune.global_unstructured([(m, "weight") for m in modules], getattr(prune, f"{method}Unstructured"), amount=amount)
    for module, weight, extra in zip(modules, weights, plan, strict=True):
        ours = make(name, weight, amount=amount, **extra)
        assert torch.equal(ours(weight), module.weight)


FIRST: list[tuple[str, dict[str, Any]]] = [
    ("l1_unstructured", {"amount": 5}),
    ("random_unstructured", {"amount": 0.3}),
    ("ln_structured", {"amount": 1, "n": 2, "dim": 0}),
    ("random_structured", {"amount": 1, "dim": 1}),
]


@pytest.mark.parametrize("first", FIRST, ids=lambda step: step[0])
@pytest.mark.parametrize("second", [*FIRST, ("l1_unstructured", {"amount": 0.5})], ids=lambda step: step[0])
def test_a_second_pruning_has_torchs_mask(
    first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]]
) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    torch.manual_seed(3)
    new = bake(rewrite(model, one_rule({first[0]: first[1]}, {second[0]: second[1]})))
    torch.manual_seed(3)
    for name, arguments in (first, second):
        getattr(prune, name)(model[0], "weight", **arguments)
    assert torch.equal(new[0].weight, model[0].weight)


@pytest.mark.parametrize("name", ["global_l1", "global_random"])
def test_a_global_pruning_after_another_has_torchs_masks(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # ties
    torch.manual_seed(3)
    new = bake(rewrite(model, one_rule({"l1_unstructured": {"amount": 0.25}}, {name: {"amount": 0.5}})))
    method = {"global_l1": prune.L1Unstructured, "global_random": prune.RandomUnstructured}[name]
    torch.manual_seed(3)
    for layer in model:
        prune.l1_unstructured(layer, "weight", 0.25)
    prune.global_unstructured([(layer, "weight") for layer in model], method, amount=0.5)
    for one, other in zip(new, model, strict=True):
        assert torch.equal(one.weight, other.weight)


def test_a_pruning_counts_what_a_given_mask_leaves() -> None:
    model, mask = nn.Sequential(nn.Linear(4, 2)), torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0]])
    prune.custom_from_mask(model[0], "weight", mask)
    prune.l1_unstructured(model[0], "weight", 0.5)
    plain = nn.Sequential(nn.Linear(4, 2))
    plain.load_state_dict({"0.weight": model[0].weight_orig, "0.bias": model[0].bias})
    new = bake(rewrite(plain, one_rule(Mask(mask), {"l1_unstructured": {"amount": 0.5}})))
    assert torch.equal(new[0].weight, model[0].weight)


def test_patterns_keep_entries_that_an_earlier_mask_leaves() -> None:
    weight = torch.tensor([[4.0, 3, 2, 1]]).repeat(2, 1)
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].weight.data.copy_(weight)
    largest = Mask(weight < 4)
    new = bake(rewrite(model, one_rule(largest, {"n_m": {"n": 2, "m": 4}})))
    assert torch.equal(new[0].weight, torch.tensor([[0.0, 3, 2, 0]]).repeat(2, 1))
    block = Mask(torch.tensor([[False, False, True, True]]))
    new = bake(rewrite(model, one_rule(block, {"block_sparse": {"amount": 1, "block_shape": [1, 2]}})))
    assert new[0].weight.count_nonzero() == 2


def test_masks_are_separate_for_each_chunk() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    step = {"l1_unstructured": {"amount": 2}}
    new = bake(rewrite(model, one_rule(step, step, per={"dim": 0, "chunks": 2})))
    assert [int(chunk.count_nonzero()) for chunk in new[0].weight.chunk(2)] == [4, 4]


@given(groups=st.integers(1, 3), m=st.integers(1, 5), data=st.data(), half=st.booleans())
def test_n_of_every_m_are_kept(groups: int, m: int, data: st.DataObject, half: bool) -> None:
    n, dim = data.draw(st.integers(0, m)), data.draw(st.integers(-2, 1))
    shape = [3, 3]
    shape[dim] = groups * m
    weight = torch.randn(shape, dtype=torch.float16 if half else torch.float32)
    value = make("n_m", weight, n=n, m=m, dim=dim)(weight)
    cut = value.movedim(dim, -1).unflatten(-1, (groups, m))
    whole = weight.movedim(dim, -1).unflatten(-1, (groups, m))
    assert value.dtype == weight.dtype
    assert ((cut != 0).sum(-1) <= n).all()
    torch.testing.assert_close(cut.abs().sum(-1), whole.abs().topk(n).values.sum(-1), rtol=1e-2, atol=1e-3)


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), amount=st.floats(0, 1), batch=st.booleans())
def test_the_smallest_blocks_are_pruned(rows: int, columns: int, amount: float, batch: bool) -> None:
    weight = torch.randn(*([2] if batch else []), 2 * rows, 3 * columns)
    value = make("block_sparse", weight, amount=amount, block_shape=[rows, columns])(weight)
    norms = weight.unflatten(-2, (2, rows)).unflatten(-1, (3, columns)).square().sum((-3, -1))
    cut = value.unflatten(-2, (2, rows)).unflatten(-1, (3, columns)).square().sum((-3, -1))
    pruned = cut == 0
    assert pruned.sum() == round(amount * norms.numel())
    if pruned.any() and not pruned.all():
        assert norms[pruned].max() <= norms[~pruned].min()


def test_infinity_can_be_written_as_text() -> None:
    weight = torch.randn(4, 6)
    as_text, as_number = (make("ln_structured", weight, amount=2, n=n, dim=0) for n in ("inf", float("inf")))
    assert torch.equal(as_text.mask, as_number.mask)


def test_pruned_steps_merge_into_one_mask() -> None:
    weight = torch.randn(4, 8)
    first, second = make("l1_unstructured", weight, amount=0.3), make("n_m", weight)
    merged = first.fuse(second)
    assert isinstance(merged, Mask)
    assert torch.equal(merged(weight), second(first(weight)))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("l1_unstructured", {"amount": 1.5}, r"shape \[4, 6\].*amount=1.5"),
        ("l1_unstructured", {"amount": 25}, "amount=25"),
        ("ln_structured", {"amount": 1, "n": 2, "dim": 5}, "index 5"),
        ("n_m", {"m": 4}, r"4 does not divide dimension -1"),
        ("n_m", {"n": 5, "m": 4}, "0 <= n <= m"),
        ("block_sparse", {"amount": 1, "block_shape": [3, 3]}, "do not tile"),
        ("block_sparse", {"amount": 1, "block_shape": [3]}, r"\[rows, columns\]"),
    ],
)
def test_impossible_arguments_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RewriterError, match=message):
        make(name, torch.randn(4, 6), **arguments)
