"""Every key of a rule does what the spec language says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import PlanError, bake, plan, rewrite

Rule = Callable[..., dict[str, Any]]


class Orthonormal(nn.Module):
    """Rows made orthonormal, one matrix at a time; does not batch."""

    def forward(self, X: Tensor) -> Tensor:
        assert X.ndim == 2
        return torch.linalg.qr(X.mT).Q.mT


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def test_per_acts_on_each_gate_on_its_own(capture: str, rule: Rule) -> None:
    model, x = Lstm().double(), torch.randn(5, 2, 3, dtype=torch.float64)
    for chain in (Orthonormal(), {"orthogonal": {"map": "cayley"}}):
        new = rewrite(model, rule("lstm.weight_hh_l0", chain, per={"dim": 0, "chunks": 4}), capture=capture)
        value = new.lstm.weight_hh_l0
        for gate in value.chunk(4, 0):
            torch.testing.assert_close(gate @ gate.T, torch.eye(4, dtype=torch.float64))
        reference = copy.deepcopy(model)
        with torch.no_grad():
            reference.lstm.weight_hh_l0.copy_(value)
        torch.testing.assert_close(new(x), reference(x))
        torch.testing.assert_close(bake(new)(x), reference(x))


def test_per_scripts_with_a_module_for_each_chunk(rule: Rule) -> None:
    class Row(nn.Module):
        def forward(self, X: Tensor) -> Tensor:
            return X / X.norm()

    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3)
    new = rewrite(model, rule("0.weight", Row(), per={"dim": 0, "chunks": 2}))
    torch.testing.assert_close(torch.jit.script(new)(x), new(x))


def test_a_value_that_is_a_view_of_the_original_is_baked(rule: Rule) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    new = rewrite(model, rule("0.weight", "transpose"))
    torch.testing.assert_close(bake(new)(x), new(x))


def test_reshape_shows_the_chain_a_matrix(capture: str, rule: Rule) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    new = rewrite(model, rule("0.weight", Orthonormal(), reshape=["out", -1]), capture=capture)
    matrix = new.get_submodule("0").weight.reshape(4, 27)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(4, dtype=torch.float64))
    assert new.state_dict()["0.parametrizations.weight.original"].shape == (4, 3, 3, 3)
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(new(x), bake(new)(x))
    if capture == "graph":
        torch.testing.assert_close(torch.jit.script(bake(new))(x), new(x))


class AutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


def test_from_computes_a_tensor_from_another_and_stores_nothing(capture: str, rule: Rule) -> None:
    model, x = AutoEncoder().double(), torch.randn(2, 5, dtype=torch.float64)
    new = rewrite(model, rule("decoder.weight", "transpose", **{"from": "encoder.weight"}), capture=capture)
    assert "decoder.weight" not in new.state_dict()
    assert not [key for key in new.state_dict() if "decoder.parametrizations" in key]
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.decoder.weight.copy_(model.encoder.weight.T)
    torch.testing.assert_close(new(x), reference(x))
    new(x).sum().backward()
    reference(x).sum().backward()
    expected = reference.encoder.weight.grad + reference.decoder.weight.grad.T
    torch.testing.assert_close(new.encoder.weight.grad, expected)
    baked = bake(new)
    assert list(baked.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(baked(x), reference(x))


def test_a_source_may_be_parametrized_itself_and_is_evaluated_once(
    capture: str, counted: nn.Module, count: Any
) -> None:
    model, x = AutoEncoder().double(), torch.randn(2, 5, dtype=torch.float64)
    spec = {
        "reparam": 1,
        "rules": [
            {"name": "source", "select": "encoder.weight", "chain": [counted], "init": "raw"},
            {"name": "tied", "select": "decoder.weight", "from": "encoder.weight", "chain": ["transpose"]},
        ],
    }
    new = rewrite(model, spec, capture=capture)
    count.total = 0
    y = new(x)
    assert count.total == 1
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.encoder.weight.div_(2)
        reference.decoder.weight.copy_(reference.encoder.weight.T)
    torch.testing.assert_close(y, reference(x))
    torch.testing.assert_close(bake(new)(x), y)
    part = bake(new, only=["source"])
    torch.testing.assert_close(part(x), y)


def test_a_step_takes_further_tensors_of_the_model(capture: str, rule: Rule) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double(), torch.randn(2, 4, dtype=torch.float64)
    affine = {"affine": {"inputs": ["0.weight"]}}
    new = rewrite(model, rule("1.weight", {"scale": {"factor": 2.0}}, affine, init="raw"), capture=capture)
    step = new.get_submodule("1.parametrizations.weight.1")
    weights = model[0].weight.detach(), model[1].weight.detach()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference[1].weight.copy_(step(2 * weights[1], weights[0]))
    torch.testing.assert_close(new(x), reference(x))
    new(x).sum().backward()
    assert new.get_parameter("0.weight").grad is not None
    torch.testing.assert_close(bake(new)(x), reference(x))


def test_joint_computes_several_tensors_of_one_module(capture: str, rule: Rule) -> None:
    class Fold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

        def forward(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return weight * self.gain, bias * self.gain + 1

        def right_inverse(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return values[0] / self.gain, (values[1] - 1) / self.gain

    model, x = AutoEncoder().double(), torch.randn(2, 5, dtype=torch.float64)
    spec = rule({"module": "Linear", "path": "*coder"}, Fold(), joint=["weight", "bias"])
    planned = plan(model, spec, capture=capture)
    assert "encoder.weight & encoder.bias" in str(planned)
    assert planned.to_dict()["sites"][0]["members"] == [["encoder.weight"], ["encoder.bias"]]
    p = plan(model, spec)
    assert [site.names for site in p] == [("encoder.weight", "encoder.bias"), ("decoder.weight", "decoder.bias")]
    assert all(site.moved < 1e-12 for site in p)
    new = rewrite(model, spec, capture=capture)
    torch.testing.assert_close(new(x), model(x))
    new(x).sum().backward()
    assert all(p.grad is not None for p in new.parameters())
    baked = bake(new)
    assert list(baked.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(baked(x), model(x))


def test_joint_takes_the_owner_that_was_selected_of_a_tied_tensor(rule: Rule) -> None:
    class Scaled(nn.Module):
        def forward(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * weight, 2 * bias

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)
            self.embed.weight = self.head.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    model, tokens = Tied().double(), torch.arange(7)
    spec = rule({"module": "Linear"}, Scaled(), joint=["weight", "bias"], init="raw")
    new = rewrite(model, spec)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.head.weight.mul_(2), reference.head.bias.mul_(2)
    torch.testing.assert_close(new(tokens), reference(tokens))
    baked = bake(new)
    assert baked.embed.weight is baked.head.weight
    torch.testing.assert_close(baked(tokens), reference(tokens))


def test_share_uses_one_parametrization_for_all_sites(rule: Rule) -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, X: Tensor) -> Tensor:
            return X * self.gain

    model = AutoEncoder()
    shared = rewrite(model, rule("*.weight", Gain(), share=True))
    apart = rewrite(model, rule("*.weight", Gain()))
    assert sum(1 for _ in shared.parameters()) == 5
    assert sum(1 for _ in apart.parameters()) == 6
    one, two = (
        getattr(shared.get_submodule(f"{side}.parametrizations.weight"), "0") for side in ("encoder", "decoder")
    )
    assert one is two


@pytest.mark.parametrize("step", [{"orthogonal": {"map": "cayley"}}, "spectral_norm"], ids=str)
def test_a_step_that_is_fitted_to_each_tensor_is_not_shared(rule: Rule, step: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(PlanError, match=r"`share: true` gives one \w+ to several tensors, and it is fitted to each"):
        rewrite(model, rule("*.weight", step, share=True))
    rewrite(model, rule("0.weight", step, share=True))


def test_a_shared_step_is_not_changed_by_the_value_of_one_tensor(rule: Rule) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    new: Any = rewrite(model, rule("*.weight", {"orthogonal": {"map": "cayley"}}, share=True, init="raw"))
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    with pytest.raises(PlanError, match=r"0\.weight cannot be set: it shares orthogonal.* with other tensors"):
        new[0].weight = torch.linalg.qr(torch.randn(4, 4))[0]
    torch.testing.assert_close(new.state_dict(), before, rtol=0, atol=0, check_stride=False)


def test_init_says_how_the_first_value_is_set(rule: Rule) -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    weight = model[0].weight.detach()
    orthogonal = {"orthogonal": {"map": "cayley"}}
    keep = rewrite(model, rule("0.weight", "symmetric")).get_submodule("0")
    torch.testing.assert_close(keep.weight, (weight + weight.T) / 2)  # the nearest one
    raw = rewrite(model, rule("0.weight", "symmetric", init="raw")).get_submodule("0")
    assert torch.equal(raw.parametrizations.weight.original, weight)
    torch.manual_seed(1)
    sampled = rewrite(model, rule("0.weight", orthogonal, init="sample")).get_submodule("0").weight
    torch.testing.assert_close(sampled @ sampled.T, torch.eye(6))
    again = rewrite(model, rule("0.weight", orthogonal, init="sample")).get_submodule("0").weight
    assert not torch.allclose(sampled, again)
    with pytest.raises(PlanError, match="needs a step that can draw from its space"):
        rewrite(model, rule("0.weight", Orthonormal(), init="sample"))
