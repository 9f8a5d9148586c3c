"""ExportedProgram in, ExportedProgram out."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import nn

import rewriter
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
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x, *, extra):
        hidden = self.bn(self.fc(self.emb(x)) + self.shift + torch.tensor([1.0, 2.0, 3.0, 4.0]))
        with torch.no_grad():
            doubled = hidden * 2
        return {"out": self.head(self.drop(hidden)) + extra["a"], "doubled": doubled}


SPEC = {
    "reparam": 1,
    "rules": [
        {"name": "s", "select": {"module": "torch.nn.Linear", "path": "fc.weight"}, "chain": ["spectral_norm"]},
        {"name": "w", "select": "emb.weight", "chain": ["weight_norm"]},
        {"name": "b", "select": "fc.bias", "chain": [{"scale": {"factor": 2.0}}]},
    ],
}
EXTRA = {"a": torch.ones(7)}


MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@functools.cache
def _exported(training):
    """A model and its program; tests do not change them."""
    torch.manual_seed(0)
    model = Net().train(training)
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC}, "extra": {"a": None}}
    return model, torch.export.export(model, (torch.arange(3),), {"extra": EXTRA}, dynamic_shapes=dynamic)


@pytest.fixture
def training():
    return True


@pytest.fixture
def model(training):
    return copy.deepcopy(_exported(training)[0])


@pytest.fixture
def program(training):
    return _exported(training)[1]


def _saved(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def _run(call, x):
    torch.manual_seed(3)
    return call(x, extra=EXTRA)


@MODES
@pytest.mark.parametrize("through_a_file", [False, True])
def test_outputs_and_gradients_equal_the_rewritten_module(model, program, through_a_file):
    torch.manual_seed(0)
    reference = rewriter.rewrite(model, SPEC)
    torch.manual_seed(0)
    new = rewriter.rewrite(program, SPEC)
    module = (_saved(new) if through_a_file else new).module()
    for x in (torch.arange(5), torch.arange(6)):
        expected, found = _run(reference, x), _run(module, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected["out"].sum().backward()
    found["out"].sum().backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    found_gradients = dict(module.named_parameters())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name].grad, gradient, rtol=1e-3, atol=1e-4)
    buffers = dict(module.named_buffers())
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-3, atol=1e-4)


def test_keys_are_those_of_the_rewritten_module(model, program):
    assert set(rewriter.rewrite(program, SPEC).state_dict) == set(rewriter.rewrite(model, SPEC).state_dict())


def test_the_program_that_was_given_stays_as_it_was(program):
    graph, values = str(program.graph), {name: value.clone() for name, value in program.state_dict.items()}
    rewriter.rewrite(program, SPEC)
    assert str(program.graph) == graph
    assert list(program.state_dict) == list(values)
    assert all(torch.equal(program.state_dict[name], value) for name, value in values.items())


def test_in_place_the_tensors_are_the_same_objects():
    _, program = _exported.__wrapped__(True)
    before = {id(value) for value in program.state_dict.values()}
    new = rewriter.rewrite(program, SPEC, inplace=True)
    kept = [name for name, value in new.state_dict.items() if id(value) in before]
    assert "bn.weight" in kept
    assert "fc.parametrizations.weight.original" in kept


@MODES
@pytest.mark.parametrize("through_a_file", [False, True])
def test_bake_gives_the_program_back(model, program, through_a_file):
    new = rewriter.rewrite(program, SPEC)
    if through_a_file:
        # torch itself gives some nodes other names there.
        program, new = _saved(program), _saved(new)
    baked = rewriter.bake(new)
    assert str(baked.graph) == str(program.graph)
    assert str(baked.graph_signature) == str(program.graph_signature)
    order = sorted if through_a_file else list
    assert order(baked.state_dict) == order(program.state_dict)
    assert baked.state_dict["emb.weight"] is baked.state_dict["head.weight"]
    plain = rewriter.bake(rewriter.rewrite(model.eval(), SPEC))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(baked.state_dict[name], value)
        assert type(baked.state_dict[name]) is type(
            dict(plain.named_parameters(remove_duplicate=False)).get(name, value)
        )


def test_original_tensors_come_back(program):
    spec = {"reparam": 1, "rules": [SPEC["rules"][0]]}
    undone = rewriter.bake(rewriter.rewrite(program, spec), keep="original")
    for name, value in program.state_dict.items():
        assert torch.equal(undone.state_dict[name], value)


class Halving(nn.Module):
    """Stores its tensor in half the precision."""

    preserves_dtype = False

    def forward(self, X):
        return X * 1

    def right_inverse(self, value):
        return value.float()


class Doubled(nn.Module):
    def forward(self, X):
        return X.double()


def test_stored_tensors_of_another_precision_are_no_originals():
    program = torch.export.export(nn.Sequential(nn.Linear(2, 2).double()), (torch.ones(1, 2, dtype=torch.float64),))
    rule = {"name": "d", "select": "0.weight", "chain": [Halving(), Doubled()]}
    new = rewriter.rewrite(program, {"reparam": 1, "rules": [rule]})
    with pytest.raises(rewriter.PlanError, match=r"stores float32\[2, 2\], which is not the tensor it replaced"):
        rewriter.bake(new, keep="original")


def test_a_part_can_be_baked(program):
    new = rewriter.rewrite(program, SPEC)
    part = rewriter.bake(new, only=["s"])
    assert "fc.weight" in part.state_dict
    assert "emb.parametrizations.weight.original0" in part.state_dict
    _run(part.module(), torch.arange(5))
    assert str(rewriter.bake(part).graph) == str(program.graph)
    with pytest.raises(rewriter.PlanError, match="'b', 's', 'w'"):
        rewriter.bake(new, only=["nothing"])
    with pytest.raises(rewriter.PlanError, match=r"did you mean 'fc\.weight'"):
        rewriter.bake(new, only=["fc.wieght"])


def test_plan_lists_the_sites_and_the_same_spec_changes_nothing(program):
    assert [site.names for site in rewriter.plan(program, SPEC)] == [
        ("emb.weight", "head.weight"),
        ("fc.weight",),
        ("fc.bias",),
    ]
    new = rewriter.rewrite(program, SPEC)
    planned = rewriter.plan(new, SPEC)
    assert all(site.present for site in planned)
    assert planned.root == "export"
    assert str(rewriter.rewrite(new, SPEC).graph) == str(new.graph)
    other = {"reparam": 1, "rules": [{**SPEC["rules"][0], "chain": ["symmetric"]}]}
    with pytest.raises(rewriter.PlanError, match="already parametrized by rule 's'"):
        rewriter.rewrite(new, other)


def test_a_second_spec_adds_to_the_first(program):
    first = {"reparam": 1, "rules": SPEC["rules"][:1]}
    second = {"reparam": 1, "rules": SPEC["rules"][1:]}
    both = rewriter.rewrite(rewriter.rewrite(program, first), second)
    assert set(both.state_dict) == set(rewriter.rewrite(program, SPEC).state_dict)
    assert str(rewriter.bake(both).graph) == str(program.graph)


def test_a_tensor_computed_from_another_one(program):
    spec = {
        "reparam": 1,
        "rules": [
            {"name": "w", "select": "emb.weight", "chain": ["weight_norm"]},
            {"name": "f", "select": "fc.weight", "from": "tied.weight", "chain": ["transpose"]},
        ],
    }

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.tied, self.fc = nn.Embedding(7, 3), nn.Linear(3, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(self.tied(self.emb(x)))

    model = Tied().eval()
    tied = torch.export.export(model, (torch.arange(3),))
    new = rewriter.rewrite(tied, spec)
    reference = rewriter.rewrite(model, spec)
    torch.testing.assert_close(new.module()(torch.arange(3)), reference(torch.arange(3)))
    assert "fc.weight" not in new.state_dict
    assert str(rewriter.bake(new).graph) == str(tied.graph)


def test_tied_tensors_stay_tied_through_a_file(program):
    loaded = _saved(program)
    assert rewriter.plan(loaded, SPEC).sites[0].names == ("emb.weight", "head.weight")
    spec = {"reparam": 1, "rules": [{"name": "z", "select": "emb.weight", "chain": [{"scale": {"factor": 3.0}}]}]}
    new = rewriter.rewrite(loaded, spec)
    new.state_dict["emb.parametrizations.weight.original"].data.zero_()
    assert torch.equal(_run(new.module(), torch.arange(5))["out"], EXTRA["a"].expand(5, 7))


def test_what_a_train_step_writes_is_refused():
    program = torch.export.export(Net().train(), (torch.arange(3),), {"extra": EXTRA})
    select = {"path": "bn.running_mean", "kind": "buffer"}
    spec = {"reparam": 1, "rules": [{"name": "r", "select": select, "chain": [{"scale": {"factor": 2.0}}]}]}
    with pytest.raises(rewriter.PlanError, match=r"bn\.running_mean is written to"):
        rewriter.rewrite(program, spec)


class Viewing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.ones(4))

    def forward(self, x):
        self.total.view(2, 2)[0].add_(1)
        return x * self.total


@pytest.mark.parametrize("decomposed", [False, True])
def test_what_is_written_through_a_view_is_refused(decomposed):
    program = torch.export.export(Viewing(), (torch.ones(4),))
    program = program.run_decompositions() if decomposed else program
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "total", "chain": [{"scale": {"factor": 2.0}}]}]}
    with pytest.raises(rewriter.PlanError, match="total is written to"):
        rewriter.rewrite(program, spec)


def test_model_files_hold_rewritten_programs(program, tmp_path):
    save_model(rewriter.rewrite(program, SPEC), tmp_path / "model.pt2")
    loaded = load_model(tmp_path / "model.pt2", trust=True)
    assert [site.rule for site in rewriter.plan(loaded, SPEC)] == ["w", "s", "b"]
    assert list(rewriter.bake(loaded).state_dict) == list(program.state_dict)
