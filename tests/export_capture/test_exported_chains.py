"""bake of programs that torch.export made of a rewritten model: a chain is found in the graph, or refused by name."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import rewriter
from rewriter.errors import PlanError
from rewriter.export import provenance

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
SPEC = {
    "reparam": 1,
    "rules": [
        {"name": "s", "select": "0.weight", "chain": ["spectral_norm"]},
        {"name": "w", "select": "2.weight", "chain": ["weight_norm", {"scale": {"factor": 2.0}}]},
    ],
}


def _plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def _as_it_is(program):
    return program


def _saved(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def _decomposed(program):
    return program.run_decompositions()


def _decomposed_and_saved(program):
    return _saved(program.run_decompositions())


def _calls(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("capture", "strict", "then"),
    [
        ("graph", False, _decomposed_and_saved),
        ("graph", True, _as_it_is),
        ("module", False, _as_it_is),
        pytest.param("graph", False, _saved, marks=pytest.mark.slow),
        pytest.param("module", False, _decomposed_and_saved, marks=pytest.mark.slow),
        pytest.param("module", True, _as_it_is, marks=pytest.mark.slow),
    ],
)
def test_an_export_of_a_rewritten_model_bakes(capture, strict, then):
    model = rewriter.rewrite(_plain(), SPEC, capture=capture)
    program = then(torch.export.export(model, (X,), strict=strict))
    assert provenance(program) == provenance(model)
    baked = rewriter.bake(program)
    plain = rewriter.bake(model)
    assert set(baked.state_dict) == set(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(baked.state_dict[name], tensor)
        assert isinstance(baked.state_dict[name], nn.Parameter)
    torch.testing.assert_close(baked.module()(X), model(X))
    assert _calls(baked) == _calls(then(torch.export.export(plain, (X,), strict=strict)))
    _saved(baked)


def test_a_rewritten_program_bakes_after_decompositions():
    then = _decomposed_and_saved
    program = rewriter.rewrite(torch.export.export(_plain(), (X,)), SPEC)
    expected = program.module()(X)
    new = then(program)
    assert [site.rule for site in rewriter.plan(new, SPEC)] == ["s", "w"]
    part = rewriter.bake(new, only=["w"])
    assert {"0.parametrizations.weight.original", "2.weight"} <= set(part.state_dict)
    for baked in (rewriter.bake(new), rewriter.bake(part)):
        assert set(baked.state_dict) == set(_plain().state_dict())
        torch.testing.assert_close(baked.module()(X), expected)
        assert _calls(baked) == _calls(then(torch.export.export(_plain(), (X,))))


def test_a_chain_with_another_value_in_training_keeps_its_evaluation_after_decompositions():
    spec = {"reparam": 1, "rules": SPEC["rules"][:1]}
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    torch.manual_seed(0)
    program = rewriter.rewrite(torch.export.export(model, (X,)), spec)
    expected = rewriter.bake(program).state_dict["0.weight"]
    try:
        found = rewriter.bake(program.run_decompositions()).state_dict["0.weight"]
    except PlanError as refused:
        assert "0.weight" in str(refused)
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("then", [_as_it_is, pytest.param(_decomposed, marks=pytest.mark.slow)])
def test_a_program_in_train_mode_is_refused_by_name(then):
    model = rewriter.rewrite(_plain(), SPEC).train()
    with pytest.raises(
        PlanError, match=r"0\.weight .*writes to 0\.parametrizations\.weight\.0\._[uv]\. Use bake on the model"
    ):
        rewriter.bake(then(torch.export.export(model, (X,))))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight, bias):
        if self.training:
            self.calls.add_(1)
        return 2 * weight, bias + 1


def test_a_decomposed_joint_site_in_train_mode_is_refused_by_name():
    rule = {"name": "j", "joint": ["weight", "bias"], "select": {"path": "0"}, "chain": [Counting()], "init": "raw"}
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    program = rewriter.rewrite(torch.export.export(model, (X,)), {"reparam": 1, "rules": [rule]})
    assert {"0.weight", "0.bias"} <= set(rewriter.bake(program).state_dict)
    message = r"0\.weight .*writes to 0\.parametrizations\.weight\.0\.calls\. Use bake on the model"
    with pytest.raises(PlanError, match=message):
        rewriter.bake(program.run_decompositions())


class Both(nn.Module):
    def forward(self, weight, bias):
        return 2 * weight + bias.sum(), bias + 1


JOINT = {"name": "j", "joint": ["weight", "bias"], "select": {"path": "0"}, "chain": [Both()], "init": "raw"}


@pytest.mark.parametrize(
    ("capture", "then"), [("graph", _decomposed_and_saved), pytest.param("module", _as_it_is, marks=pytest.mark.slow)]
)
def test_a_joint_site_in_an_export_bakes(capture, then):
    spec = {"reparam": 1, "rules": [JOINT, SPEC["rules"][1]]}
    model = rewriter.rewrite(_plain(), spec, capture=capture)
    program = then(torch.export.export(model, (X,)))
    part = rewriter.bake(program, only=["j"])
    assert set(part.state_dict) >= {"0.weight", "0.bias", "2.parametrizations.weight.original0"}
    for baked in (part, rewriter.bake(program), rewriter.bake(part)):
        torch.testing.assert_close(baked.module()(X), model(X))
    assert set(rewriter.bake(part).state_dict) == set(_plain().state_dict())


def test_a_joint_site_of_equal_shapes_in_an_export_is_refused_by_name():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return x @ self.a + x @ self.b.T

    rule = {**JOINT, "joint": ["a", "b"], "select": {"path": "0"}}
    model = rewriter.rewrite(nn.Sequential(Pair()).eval(), {"reparam": 1, "rules": [rule]})
    with pytest.raises(PlanError, match=r"0\.a of the program .*several tensors of one shape.*Use bake on the model"):
        rewriter.bake(torch.export.export(model, (X,)))


def test_a_chain_that_runs_at_each_use_is_refused_by_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x))

    spec = {"reparam": 1, "rules": [{"name": "w", "select": "fc.weight", "chain": ["weight_norm"], "cache": "never"}]}
    program = torch.export.export(rewriter.rewrite(Twice().eval(), spec), (X,))
    with pytest.raises(PlanError, match=r"fc\.weight .*Use bake on the model"):
        rewriter.bake(program)


def test_a_chain_over_two_tensors_and_one_computed_from_another():
    spec = {
        "reparam": 1,
        "rules": [
            {"name": "w", "select": "0.weight", "chain": ["weight_norm"]},
            {"name": "f", "select": "2.weight", "from": "0.weight", "chain": ["transpose"]},
        ],
    }
    model = rewriter.rewrite(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)).eval(), spec)
    baked = rewriter.bake(torch.export.export(model, (X,)))
    torch.testing.assert_close(baked.state_dict["2.weight"], baked.state_dict["0.weight"].T)
    torch.testing.assert_close(baked.module()(X), model(X))


def test_what_torch_parametrized_bakes_too():
    model = _plain()
    nn.utils.parametrizations.weight_norm(model[0])
    baked = rewriter.bake(torch.export.export(model, (X,)))
    assert set(baked.state_dict) == set(_plain().state_dict())
    torch.testing.assert_close(baked.module()(X), model(X))


def test_an_unknown_chain_is_refused_by_name():
    program = torch.export.export(rewriter.rewrite(_plain(), SPEC), (X,))
    for node in program.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    with pytest.raises(PlanError, match=r"0\.weight, 2\.weight .*Use bake on the model"):
        rewriter.bake(program)


def test_a_program_that_nobody_rewrote_warns():
    with pytest.warns(UserWarning, match="bake found no computed tensor"):
        rewriter.bake(torch.export.export(_plain(), (X,)))
    with pytest.warns(UserWarning, match="bake found no computed tensor"):
        rewriter.bake(_plain())
