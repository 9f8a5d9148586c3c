"""What torch's own tests ask of pruning, asked of rules. Masks that equal torch's are in test_pruning.py."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from rewriter import RewriterError, SpecError, absorb, bake, plan, rewrite
from rewriter.io import load_model, save_model
from rewriter.parametrizations._mask import Mask
from rewriter.state import extend, get_value
from tests.rules import one_rule

ROWS = torch.tensor([[1.0, 2, 3, 4], [-4, -3, -2, -1]])
SCORES = torch.tensor([[4.0, 2, 1, 3], [-3, -1, -2, -4]])


spec = functools.partial(one_rule, select="0.weight")


def of_weights(*weights: Tensor) -> nn.Sequential:
    """Linear layers with these weights."""
    model = nn.Sequential(*(nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights))
    for layer, weight in zip(model, weights, strict=True):
        layer.weight.data = weight.clone()
    return model


@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Conv3d(2, 2, 2)], ids=["Linear", "Conv3d"])
def test_the_original_stays_and_the_value_is_masked(
    capture: str, layer: nn.Module, tensor: str, tmp_path: Path
) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    before = getattr(model[0], tensor).detach().clone()
    rule = spec({"random_unstructured": {"amount": 0.5}}, select=f"0.{tensor}")
    new = rewrite(model, rule, capture=capture)
    site = new.get_submodule(f"0.parametrizations.{tensor}")
    assert torch.equal(site.original, before)
    mask = site.get_submodule("0").mask
    assert mask.shape == before.shape
    assert torch.equal(get_value(new, f"0.{tensor}"), before * mask)
    save_model(new, tmp_path / "model.pt")
    for again in (pickle.loads(pickle.dumps(new)), load_model(tmp_path / "model.pt")):
        assert torch.equal(get_value(again, f"0.{tensor}"), before * mask)
    plain = bake(new)
    assert torch.equal(getattr(plain[0], tensor), before * mask)
    assert list(plain.state_dict()) == list(model.state_dict())


def test_masked_entries_get_no_gradient_and_do_not_move(capture: str) -> None:
    mask = torch.ones(2, 4)
    mask[1, 0] = mask[0, 3] = 0
    model = of_weights(ROWS)
    new = rewrite(model, spec(Mask(mask)), capture=capture)
    value = new(torch.ones(1, 4))
    torch.testing.assert_close(value, (ROWS * mask).sum(1)[None] + model[0].bias)
    value.sum().backward()
    original = new.get_parameter("0.parametrizations.weight.original")
    assert torch.equal(original.grad, mask)
    torch.optim.SGD(new.parameters(), lr=1.0).step()
    assert torch.equal(original.detach(), ROWS - mask)
    baked = bake(new)
    assert torch.equal(baked(torch.ones(1, 4)), new(torch.ones(1, 4)))


@pytest.mark.parametrize("way", ["one chain", "extend"])
@pytest.mark.parametrize("scores", [None, SCORES], ids=["magnitudes", "scores"])
def test_a_second_pruning_takes_the_next_entries(capture: str, way: str, scores: Tensor | None) -> None:
    step = {"l1_unstructured": {"amount": 2, **({} if scores is None else {"importance_scores": scores})}}
    once = rewrite(of_weights(ROWS), spec(step), capture=capture)
    first = [[0.0, 2, 3, 4], [-4, -3, -2, 0]] if scores is None else [[1.0, 2, 0, 4], [-4, 0, -2, -1]]
    assert torch.equal(get_value(once, "0.weight"), torch.tensor(first))
    twice = extend(once, spec(step)) if way == "extend" else rewrite(of_weights(ROWS), spec(step, step))
    second = [[0.0, 0, 3, 4], [-4, -3, 0, 0]] if scores is None else [[1.0, 0, 0, 4], [-4, 0, 0, -1]]
    assert torch.equal(get_value(twice, "0.weight"), torch.tensor(second))


@pytest.mark.parametrize("scored", [False, True])
def test_a_global_budget_takes_the_smallest_of_all(capture: str, scored: bool) -> None:
    model = of_weights(ROWS, torch.tensor([[0.0, 0.1, -2]]))
    scores = {"0.weight": SCORES, "1.weight": torch.tensor([[0.0, 10.0, -0.2]])}
    step = {"global_l1": {"amount": 4, **({"importance_scores": scores} if scored else {})}}
    new = rewrite(model, spec(step, select="*.weight"), capture=capture)
    first = [[1.0, 2, 0, 4], [-4, 0, -2, -1]] if scored else [[0.0, 2, 3, 4], [-4, -3, -2, 0]]
    second = [[0.0, 0.1, 0]] if scored else [[0.0, 0, -2]]
    assert torch.equal(get_value(new, "0.weight"), torch.tensor(first))
    assert torch.equal(get_value(new, "1.weight"), torch.tensor(second))


def test_scores_of_another_tensor_are_refused() -> None:
    model = of_weights(ROWS)
    for scores, message in (({"1.weight": ROWS}, "the rule has 0.weight"), ({"0.weight": ROWS[:1]}, r"\[2, 4\]")):
        with pytest.raises(RewriterError, match=message):
            rewrite(model, spec({"global_l1": {"amount": 1, "importance_scores": scores}}))
    with pytest.raises(SpecError, match="importance_scores"):
        rewrite(model, spec({"global_l1": {"amount": 1, "importance_scores": {"0.weight": "text"}}}))


def test_long_arguments_are_printed_short() -> None:
    step = {"l1_unstructured": {"amount": 1, "importance_scores": SCORES}}
    assert plan(of_weights(ROWS), spec(step)).sites[0].chain == ("l1_unstructured(amount=1, importance_scores=…)",)


def test_undoing_what_is_not_pruned_is_refused() -> None:
    new = rewrite(of_weights(ROWS), spec({"l1_unstructured": {"amount": 1}}))
    with pytest.raises(RewriterError, match=r"0\.bias"):
        bake(new, only=["0.bias"])


def test_a_state_dict_of_torchs_pruning_goes_in_and_a_plain_one_comes_out() -> None:
    reference = of_weights(ROWS)
    prune.l1_unstructured(reference[0], "weight", 0.9)
    pruned = reference[0].weight.detach().clone()
    new = rewrite(of_weights(torch.randn(2, 4)), spec({"l1_unstructured": {"amount": 0.9}}))
    new.load_state_dict(reference.state_dict())
    assert torch.equal(get_value(new, "0.weight"), pruned)
    plain = of_weights(torch.randn(2, 4))
    plain.load_state_dict(bake(new).state_dict())
    assert torch.equal(plain[0].weight, pruned)
    assert torch.equal(get_value(absorb(reference), "0.weight"), pruned)


@pytest.mark.parametrize("amount", [0, 7, 12], ids=["none", "some", "all"])
def test_a_pruned_lstm_is_the_one_with_zeros(capture: str, amount: int) -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 1)}) if capture == "module" else nn.Sequential(nn.LSTM(3, 1))
    name = "rnn.weight_ih_l0" if capture == "module" else "0.weight_ih_l0"
    new = rewrite(model, spec({"l1_unstructured": {"amount": amount}}, select=name), capture=capture)
    reference = copy.deepcopy(model)
    weight = reference.get_parameter(name)
    mask = torch.ones(12).index_fill(0, weight.detach().flatten().abs().topk(amount, largest=False).indices, 0)
    weight.data *= mask.view(4, 3)
    x = torch.randn(5, 2, 3)
    for one in (new, reference):
        part = one["rnn"] if capture == "module" else one
        part(x)[0].sum().backward()
    original = new.get_parameter(name.replace("weight", "parametrizations.weight") + ".original")
    torch.testing.assert_close(original.grad, weight.grad * mask.view(4, 3))
    assert torch.equal(bake(new).get_parameter(name), weight)
