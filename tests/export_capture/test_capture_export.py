"""capture="export" and example inputs."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

import rewriter
from rewriter.bindings import RewrittenModule
from rewriter.errors import CaptureError
from rewriter.io import load_model, save_model


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


class Counting(nn.Module):
    """Counts its calls in every mode, beside a batch norm that counts in one."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        out = self.bn(self.fc(x))
        self.calls.add_(1)
        return out + self.calls


@pytest.mark.parametrize("captured_in_training", [False, True])
def test_a_buffer_that_the_forward_counts_in_counts_on_in_both_modes(captured_in_training):
    model, x = Counting().train(captured_in_training), torch.randn(3, 4)
    new = rewriter.rewrite(model, FC, capture="export", example_inputs=(x,))
    assert (float(model.calls), float(new.calls)) == (0, 0)
    reference = rewriter.rewrite(model, FC, capture="module")
    for training in (True, False, True):
        new.train(training), reference.train(training)
        torch.testing.assert_close(new(x), reference(x))
    assert float(rewriter.bake(new).calls) == 3
    assert int(new.get_buffer("bn.num_batches_tracked")) == 2


class Fixing(nn.Module):
    """Works for one length only, whatever is said of it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) * 3 if x.shape[1] == 5 else self.fc(x)


def test_a_size_that_the_forward_fixes_does_not_vary():
    x, vary = torch.randn(2, 5, 4), ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    new = rewriter.rewrite(Fixing(), FC, capture="export", example_inputs=(x,), dynamic_shapes=vary)
    new(torch.randn(7, 5, 4))
    with pytest.raises(CaptureError, match=r"captured for .*, 5, 4"):
        new(torch.randn(2, 6, 4))
    vary = {"x": {1: torch.export.Dim("length")}}
    with pytest.raises(CaptureError, match=r"length as dynamic but your code specialized it to be a constant \(5\)"):
        rewriter.rewrite(Fixing(), FC, capture="export", example_inputs=(x,), dynamic_shapes=vary)


class Choosing(Branching):
    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


def test_what_torch_export_cannot_do_names_the_line_and_another_way():
    with pytest.raises(CaptureError, match=r"(?s)test_capture_export\.py:\d+: `return .*x\.sum\(\).*capture='module'"):
        rewriter.rewrite(Choosing(), FC, capture="export", example_inputs=(torch.randn(2, 4),))


@pytest.mark.parametrize("verb", [rewriter.rewrite, rewriter.plan])
def test_example_inputs_are_a_tuple_or_the_only_argument(verb):
    x = torch.randn(2, 4)
    bare, packed = (verb(Branching(), FC, capture="export", example_inputs=given) for given in (x, (x,)))
    assert str(getattr(bare, "graph", bare)) == str(getattr(packed, "graph", packed))
    with pytest.raises(CaptureError, match=r"not a dict; arguments by name are example_kwargs"):
        verb(Branching(), FC, example_inputs={"x": x})
    with pytest.raises(CaptureError, match="example_kwargs maps names"):
        verb(Branching(), FC, example_kwargs=[1])
