"""capture="export" and example inputs."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

import rewriter
from rewriter.errors import CaptureError
from rewriter.io import load_model, save_model
from rewriter.runtime import RewrittenModule


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.emb.weight
        self.drop = nn.Dropout(0.5)

    def forward(self, x, mask=None, *, extra):
        hidden = self.fc(self.emb(x))
        if hidden.shape[-1] == 4 and mask is None:
            hidden = self.bn(hidden) + torch.tensor([1.0, 2.0, 3.0, 4.0])
        with torch.no_grad():
            doubled = hidden * 2
        return {"out": self.head(self.drop(hidden)) + extra["a"][0], "doubled": doubled}


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x).relu() if self.training else self.fc(x).tanh() + 1


class Drifting(nn.Module):
    """What torch.fx records of it is what its first call does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) * (3.0 if is_fx_symbolic_tracing() else 1.0)


SPEC = {
    "reparam": 1,
    "rules": [
        {"name": "s", "select": "fc.weight", "chain": ["spectral_norm"]},
        {"name": "w", "select": "emb.weight", "chain": ["weight_norm"]},
    ],
}
FC = {"reparam": 1, "rules": [{"name": "w", "select": "fc.weight", "chain": ["weight_norm"]}]}
EXTRA = {"a": [torch.ones(7)]}
CALL = {
    "example_inputs": (torch.arange(3),),
    "example_kwargs": {"extra": EXTRA},
    "dynamic_shapes": {"x": {0: torch.export.Dim.DYNAMIC}, "extra": {"a": [None]}},
}


def _run(model, x):
    torch.manual_seed(3)
    return model(x, extra=EXTRA)


@pytest.mark.parametrize("captured_in_training", [True, False])
def test_one_graph_for_train_and_eval_equals_module_mode(captured_in_training):
    model = Net().train(captured_in_training)
    torch.manual_seed(0)
    reference = rewriter.rewrite(model, SPEC, capture="module")
    torch.manual_seed(0)
    new = rewriter.rewrite(model, SPEC, capture="export", **CALL)
    assert isinstance(new, RewrittenModule)
    assert set(new.state_dict()) == set(reference.state_dict())
    for training in (True, False, True):
        new.train(training)
        reference.train(training)
        for x in (torch.arange(5), torch.arange(6)):
            torch.testing.assert_close(_run(new, x), _run(reference, x), rtol=1e-4, atol=1e-4)
    _run(new, x)["out"].sum().backward()
    _run(reference, x)["out"].sum().backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in new.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(new.get_buffer(name), buffer, rtol=1e-4, atol=1e-4)


def test_each_site_is_evaluated_once_and_bake_gives_the_class_back():
    model = Net().eval()
    new = rewriter.rewrite(model, SPEC, capture="export", **CALL)
    assert str(new).count("evaluate emb.weight = head.weight") == 1
    baked = rewriter.bake(new)
    assert type(baked) is Net
    assert list(baked.state_dict()) == list(model.state_dict())
    assert [name for name, _ in baked.named_buffers()] == [name for name, _ in model.named_buffers()]
    torch.testing.assert_close(_run(baked, torch.arange(4)), _run(new, torch.arange(4)))


def test_the_result_copies_pickles_saves_and_exports(tmp_path):
    new = rewriter.rewrite(Net().eval(), SPEC, capture="export", **CALL)
    expected = _run(new, torch.arange(5))
    torch.testing.assert_close(_run(pickle.loads(pickle.dumps(new)), torch.arange(5)), expected)
    save_model(new, tmp_path / "new.pt")
    loaded = load_model(tmp_path / "new.pt", allow=[f"{Net.__module__}.Net"])
    torch.testing.assert_close(_run(loaded, torch.arange(5)), expected)
    program = torch.export.export(new, (torch.arange(5), None, EXTRA))
    torch.testing.assert_close(program.module()(torch.arange(5), None, EXTRA), expected)


def test_the_plan_says_export():
    planned = rewriter.plan(Net(), SPEC, capture="export", **CALL)
    assert planned.root == "export"
    assert {site.capture for site in planned} == {"export"}


def test_another_input_than_it_was_captured_for_is_refused():
    new = rewriter.rewrite(Net().eval(), SPEC, capture="export", **{**CALL, "dynamic_shapes": None})
    with pytest.raises(CaptureError, match=r"x has shape \[5\]; the model was captured for \[3\]"):
        _run(new, torch.arange(5))
    with pytest.raises(CaptureError, match="mask was None when the model was captured"):
        new(torch.arange(3), torch.ones(3), extra=EXTRA)


def test_modes_that_do_different_things_are_not_mixed():
    model = Branching().eval()
    x = torch.randn(2, 4)
    new = rewriter.rewrite(model, FC, capture="export", example_inputs=(x,))
    torch.testing.assert_close(new(x), model(x))
    with pytest.raises(CaptureError, match="captured in eval mode, and its graph in train mode is another one"):
        new.train()(x)
    assert "eval mode only" in rewriter.plan(model, FC, capture="export", example_inputs=(x,)).why


def test_export_wants_example_inputs_and_says_what_it_cannot_do():
    with pytest.raises(CaptureError, match="give example_inputs"):
        rewriter.rewrite(Net(), SPEC, capture="export")
    with pytest.raises(CaptureError, match=r"do not fit|cannot capture"):
        rewriter.rewrite(Net(), SPEC, capture="export", example_inputs=(torch.arange(3), 1, 2, 3, 4))


def test_a_traced_graph_that_is_not_the_model_is_not_used():
    model, x = Drifting(), torch.randn(2, 4)
    buffers, state = model.state_dict(), torch.get_rng_state()
    with pytest.raises(CaptureError, match="the traced graph is not the model"):
        rewriter.rewrite(model, FC, capture="graph", example_inputs=(x,))
    planned = rewriter.plan(model, FC, example_inputs=(x,))
    assert planned.root == "module"
    assert "the traced graph is not the model" in planned.why
    new = rewriter.rewrite(model, FC, example_inputs=(x,))
    torch.testing.assert_close(new(x), model(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())


def test_a_comparison_changes_neither_modes_nor_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    spec = {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}
    new = rewriter.rewrite(model, spec, example_inputs=(torch.randn(3, 4),), inplace=True)
    assert isinstance(new, RewrittenModule)
    assert [module.training for module in (new.get_submodule("1"), new.get_submodule("2"))] == [False, True]
    assert int(new.get_buffer("1.num_batches_tracked")) == 0
