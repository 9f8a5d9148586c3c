"""Rules beside tensors that torch parametrizes, nested parametrizations, and absorbing in place."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import rewriter
from rewriter import absorb, bake, plan, rewrite
from rewriter.bindings import RewrittenModule
from rewriter.errors import ModelFileError
from rewriter.io import load_model, save_model


def spec(select, *chain, **options):
    return {"reparam": 1, "rules": [{"name": "r", "select": select, "chain": list(chain)}], **options}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 3)

    def forward(self, x):
        return self.rnn(x)[0]


def _normed_linear():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)), "0.bias", "0"


def _orthogonal_recurrent():
    model = Recurrent()
    parametrizations.orthogonal(model.rnn, "weight_hh_l0")
    return model, "rnn.weight_ih_l0", "rnn"


@pytest.mark.parametrize("make", [_normed_linear, _orthogonal_recurrent])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("capture", ["auto", "module"])
def test_a_rule_beside_a_parametrized_tensor(make, inplace, capture):
    torch.manual_seed(0)
    model, name, owner = make()
    x = torch.randn(4, 3)
    y, keys = model(x), set(model.state_dict())
    made = plan(model, spec(name, "identity"), capture=capture)
    assert name in made.by_name
    assert parametrize.is_parametrized(model.get_submodule(owner))
    new = rewrite(model, spec(name, "identity"), inplace=inplace, capture=capture)
    torch.testing.assert_close(new(x), y)
    assert keys - set(new.state_dict()) == {name}
    new(x).sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())
    torch.testing.assert_close(bake(new)(x), y)


def test_a_failing_rewrite_beside_a_parametrized_tensor_loses_nothing():
    model, name, _ = _normed_linear()
    x = torch.randn(2, 3)
    y, keys = model(x), list(model.state_dict())
    with pytest.raises(rewriter.PlanError, match="skew"):
        rewrite(model, spec(name, "skew"), inplace=True)
    assert list(model.state_dict()) == keys
    assert parametrize.is_parametrized(model[0])
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("make", [_normed_linear, _orthogonal_recurrent])
def test_a_failing_absorb_in_place_loses_nothing(make):
    model, name, owner = make()
    x = torch.randn(2, 3)
    y, keys, parameters = model(x), list(model.state_dict()), list(model.parameters())
    with pytest.raises(rewriter.PlanError):
        rewrite(model, spec(name, "skew", absorb=True), inplace=True)
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert parametrize.is_parametrized(model.get_submodule(owner))
    assert torch.equal(model(x), y)


def test_absorbing_in_place_makes_no_copy():
    model, _, _ = _normed_linear()
    model.lock = threading.Lock()  # which cannot be copied
    x = torch.randn(2, 3)
    y = model(x)
    with pytest.raises(rewriter.CaptureError, match="cannot be copied"):
        absorb(model)
    new = absorb(model, inplace=True)
    assert not parametrize.is_parametrized(new)
    torch.testing.assert_close(new(x), y)


def test_absorb_captures_as_asked(capture):
    model, _, _ = _normed_linear()
    new = absorb(model, capture=capture)
    assert isinstance(new, RewrittenModule) == (capture == "graph")


class Unit(nn.Module):
    def forward(self, u):
        return u / u.norm()


class RankOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.u = nn.Parameter(torch.randn(3))
        parametrize.register_parametrization(self, "u", Unit())

    def forward(self, X):
        return X + torch.outer(self.u, self.u)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_parametrization_with_a_parametrized_tensor_is_absorbed(inplace):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3))
    parametrize.register_parametrization(model[0], "weight", RankOne())
    x = torch.randn(2, 3)
    y = model(x)
    assert [site.name for site in plan(model, spec("0.bias", "identity", absorb=True))] == ["0.weight", "0.bias"]
    new = absorb(model, inplace=inplace)
    torch.testing.assert_close(new(x), y)
    new(x).sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())
    torch.testing.assert_close(bake(new)(x), y)


@pytest.mark.parametrize("verb", [absorb, copy.deepcopy])
def test_a_file_has_no_class_of_torchs_parametrize_and_says_to_bake(verb, tmp_path):
    model = nn.Sequential(nn.Linear(3, 3))
    parametrize.register_parametrization(model[0], "weight", RankOne())
    with pytest.raises(ModelFileError, match=r"computes a tensor of 0\b.*bake the model first.*or save its state dict"):
        save_model(verb(model), tmp_path / "out.pt")
    save_model(bake(absorb(model)), tmp_path / "out.pt")
    torch.testing.assert_close(load_model(tmp_path / "out.pt")[0].weight, model[0].weight)


def test_bake_copies_a_model_with_old_hooks_elsewhere():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    x = torch.randn(2, 3)
    new = rewrite(model, spec("1.weight", "orthogonal"))
    y = new(x)
    torch.testing.assert_close(bake(new)(x), y)
