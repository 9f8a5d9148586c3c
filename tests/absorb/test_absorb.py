"""What torch's own tools did to a model is taken over: same outputs, same tensors, none of their machinery left."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import rewriter
from rewriter._copy import copied
from rewriter.io import load_model, save_model
from tests.absorb.sources import (
    KINDS,
    Recurrent,
    _chain,
    _old_recurrent,
    _old_spectral_norm,
    _old_weight_norm,
    _orthogonal,
    _pruned,
    _pruned_often,
    _several,
    _two,
    _untraceable,
)

EXPORTED = (_chain, _old_recurrent, _pruned_often)


@pytest.fixture(
    params=[pytest.param((make, kind), id=make.__name__[1:]) for kind, makes in KINDS.items() for make in makes]
)
def source(request):
    return request.param


@pytest.fixture
def x():
    return torch.randn(5, 4)


def _machinery(model):
    for module in model.modules():
        yield from module._forward_pre_hooks.values()
        yield from module._state_dict_hooks.values()
        yield from module._load_state_dict_pre_hooks.values()
        if isinstance(module, parametrize.ParametrizationList):
            yield module


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_the_same(source, x, training):
    model = source[0]()
    model.train(training and not isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.BatchNorm1d))
    new = rewriter.absorb(model)
    stored = {id(parameter) for parameter in model.parameters()}
    assert not stored & {id(parameter) for parameter in new.parameters()}
    for _ in range(3):
        expected, found = model(x), new(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.square().sum().backward()
    found.square().sum().backward()
    before = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    after = [p.grad.norm() for p in new.parameters() if p.grad is not None]
    torch.testing.assert_close(sorted(map(float, after)), sorted(map(float, before)), rtol=1e-4, atol=1e-5)


def test_nothing_of_the_source_is_left_but_in_the_model_that_was_given(source, x):
    model = source[0]().eval()
    keys, expected = list(model.state_dict()), model(x)
    new = rewriter.absorb(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    assert list(_machinery(model))
    assert list(_machinery(new)) == []
    assert not any(type(module).__name__.startswith("Parametrized") and "parametrize" in type(module).__module__
                   for module in new.modules())  # fmt: skip
    rules = {site.spec.rule for site in new.modules() if hasattr(site, "original_names")}
    assert rules == {f"absorbed:{source[1]}"}


def test_in_place_the_parameter_objects_stay(source, x):
    model = source[0]().eval()
    expected, before = model(x).detach(), {id(parameter) for parameter in model.parameters()}
    new = rewriter.absorb(model, inplace=True)
    assert {id(parameter) for parameter in new.parameters()} == before
    torch.testing.assert_close(new(x), expected)


def test_bake_gives_plain_modules_that_script_and_pickle_and_export(source, x):
    model = source[0]().eval()
    expected = model(x)
    baked = rewriter.bake(rewriter.absorb(model))
    assert not any("parametrizations" in key or "_orig" in key or "_mask" in key for key in baked.state_dict())
    torch.testing.assert_close(baked(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(baked))(x), expected)
    torch.testing.assert_close(torch.jit.script(baked)(x), expected)
    if source[0] in EXPORTED:
        torch.testing.assert_close(torch.export.export(baked, (x,)).module()(x), expected)


def test_the_result_copies_exports_and_survives_a_file(source, x, tmp_path):
    model = source[0]().eval()
    expected = model(x)
    new = rewriter.absorb(model)
    torch.testing.assert_close(copy.deepcopy(new)(x), expected)
    buffer = io.BytesIO(pickle.dumps(new))
    torch.testing.assert_close(pickle.load(buffer)(x), expected)
    if source[0] in EXPORTED:
        torch.testing.assert_close(torch.export.export(new, (x,)).module()(x), expected)
    save_model(new, tmp_path / "new.pt")
    torch.testing.assert_close(load_model(tmp_path / "new.pt", allow=["tests.absorb.*"])(x), expected)


def test_bake_gives_the_tensors_in_the_order_of_a_plain_model():
    for make in (_pruned_often, _several, _old_weight_norm):
        assert list(rewriter.bake(rewriter.absorb(make())).state_dict()) == list(_two().state_dict())
    assert list(rewriter.bake(rewriter.absorb(_old_recurrent())).state_dict()) == list(Recurrent().state_dict())


def test_a_tensor_computed_already_is_refused_with_how_to_absorb_it():
    for make, source in ((_orthogonal, "torch.parametrize"), (_pruned, "torch.prune")):
        spec = {"reparam": 1, "rules": [{"name": "s", "select": "0.weight", "chain": ["symmetric"]}]}
        with pytest.raises(rewriter.PlanError, match=rf"0\.weight is computed already, by {source}") as refused:
            rewriter.rewrite(make(), spec)
        assert "absorb: true" in str(refused.value)
        assert "rewriter.absorb(model)" in str(refused.value)


def test_other_tensors_of_the_model_are_rewritten_without_absorbing(x):
    model = _orthogonal()
    spec = {"reparam": 1, "rules": [{"name": "w", "select": "2.weight", "chain": ["weight_norm"]}]}
    torch.testing.assert_close(rewriter.rewrite(model, spec)(x), model(x))


def test_a_spec_absorbs_and_adds_rules(x):
    model = _orthogonal()
    spec = {
        "reparam": 1,
        "absorb": True,
        "rules": [{"name": "w", "select": "2.weight", "chain": ["weight_norm"]}],
    }
    assert [site.rule for site in rewriter.plan(model, spec)] == ["absorbed:torch.parametrize", "w"]
    new = rewriter.rewrite(model, spec)
    torch.testing.assert_close(new(x), model(x))
    assert list(rewriter.rewrite(new, spec).state_dict()) == list(new.state_dict())
    part = rewriter.bake(new, only=["absorbed:torch.parametrize"])
    assert "0.weight" in part.state_dict()
    assert "2.parametrizations.weight.original0" in part.state_dict()


@pytest.mark.parametrize("make", [_orthogonal, _untraceable])
def test_rules_can_be_added_later(make, x):
    absorbed = rewriter.absorb(make())
    name = "2.bias" if make is _orthogonal else "fc.bias"
    spec = {"reparam": 1, "rules": [{"name": "w", "select": name, "chain": [{"scale": {"factor": 2.0}}]}]}
    new = rewriter.rewrite(absorbed, spec)
    torch.testing.assert_close(new.eval()(x), absorbed.eval()(x))
    new(x).sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters() if parameter.requires_grad)


def test_a_rule_on_an_absorbed_tensor_is_an_error():
    spec = {"reparam": 1, "absorb": True, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}
    model = _orthogonal()
    with pytest.raises(rewriter.PlanError, match=r"already parametrized by rule 'absorbed:torch\.parametrize'"):
        rewriter.rewrite(model, spec, inplace=True)
    assert parametrize.is_parametrized(model[0])


def test_absorbing_twice_changes_nothing():
    once = rewriter.absorb(_orthogonal())
    assert list(rewriter.absorb(once).state_dict()) == list(once.state_dict())
    assert type(rewriter.absorb(_two())) is nn.Sequential


def test_a_tensor_that_is_stored_elsewhere_too_is_not_overwritten_by_bake(x):
    model = _two()
    model[2] = nn.Linear(4, 4)
    parametrizations.orthogonal(model[0])
    model[2].weight = model[0].parametrizations.weight.original
    plain = model[2].weight.detach().clone()
    baked = rewriter.bake(rewriter.absorb(model))
    assert torch.equal(baked[2].weight, plain)
    torch.testing.assert_close(baked(x), model(x))


def test_the_state_of_spectral_norm_comes_over_and_advances_once_a_forward(x):
    model = _old_spectral_norm().train()
    for _ in range(3):
        model(x)
    new = rewriter.absorb(model)
    reference = copied(model)
    for _ in range(2):
        torch.testing.assert_close(new(x), reference(x))
    buffers = dict(new.named_buffers())
    assert torch.allclose(buffers["2.2.parametrizations.weight.0._u"], reference[2][2].weight_u)
