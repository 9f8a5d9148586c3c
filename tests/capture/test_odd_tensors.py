"""Tensors that are not an ordinary Parameter: each keeps what makes it odd, or is refused with a reason."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import PlanError, RewriterError, bake, plan, rewrite
from tests.capture.odd import CAPTURES, Product, spec


def buffered(tensor: Tensor, persistent: bool = True) -> nn.Module:
    model = Product()
    model.register_buffer("w", tensor, persistent=persistent)
    return model


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
        self.dict = nn.ParameterDict({"a": torch.randn(4, 4), "b": torch.randn(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.list:
            x = x @ parameter
        return x @ self.dict["a"] @ self.dict["b"]


def two_names() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    return model


def shared_parameter() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].bias = model[0].bias
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "buffer": (lambda: buffered(torch.randn(4, 4)), "w"),
    "buffer outside the state dict": (lambda: buffered(torch.randn(4, 4), persistent=False), "w"),
    "integer buffer": (lambda: buffered(2 * torch.arange(16).view(4, 4)), "w"),
    "integer parameter": (
        lambda: Product(w=nn.Parameter(2 * torch.arange(16).view(4, 4), requires_grad=False)),
        "w",
    ),
    "complex": (lambda: Product(w=nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))), "w"),
    "half": (lambda: Product(w=nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))), "w"),
    "frozen": (lambda: nn.Sequential(nn.Linear(4, 4)).requires_grad_(False), "0.weight"),
    "list": (Listed, "list.*"),
    "dict": (Listed, "dict.a"),
    "everything": (Listed, "**"),
    "no elements": (lambda: Product(w=nn.Parameter(torch.randn(4, 0))), "w"),
    "module with two names": (two_names, "0.weight"),
    "shared parameters": (shared_parameter, "{0.weight,2.bias}"),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    build, select = MODELS[request.param]
    return build(), select


def described(model: nn.Module) -> list[Any]:
    tensors = [
        (name, type(tensor), tensor.dtype, tensor.requires_grad, tensor.is_contiguous())
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    ]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [tensors, list(model.state_dict()), [type(module) for module in model.modules()], hooks]


@CAPTURES
def test_values_stay_and_bake_restores_the_kind(case: Any, capture: str) -> None:
    model, select = case
    x = torch.randn(3, 4)
    before = described(model)
    new = rewrite(model, spec(select), capture=capture)
    assert described(model) == before
    count = len(list(model.parameters())), len(list(model.buffers())), len(model.state_dict())
    assert (len(list(new.parameters())), len(list(new.buffers())), len(new.state_dict())) == count
    trained = sorted(parameter.requires_grad for parameter in model.parameters())
    assert sorted(parameter.requires_grad for parameter in new.parameters()) == trained
    torch.testing.assert_close(new(x), model(x), rtol=0, atol=0)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            plain = bake(new)
        assert described(plain) == before
        torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)
        if plain(x).requires_grad:
            plain(x).abs().sum().backward()


@CAPTURES
def test_rewriting_under_another_mode_makes_ordinary_tensors(case: Any, capture: str) -> None:
    model, select = case
    x = torch.randn(3, 4)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            new = rewrite(model, spec(select), capture=capture)
        assert not any(tensor.is_inference() for tensor in new.state_dict(keep_vars=True).values())
        result = new(x)
        assert result.requires_grad == model(x).requires_grad
        if result.requires_grad:
            result.abs().sum().backward()


@CAPTURES
def test_a_part_can_be_baked(capture: str) -> None:
    model, x = Listed(), torch.randn(3, 4)
    new = rewrite(model, spec("**"), capture=capture)
    part = bake(new, only=["list.*"])
    assert [name for name, _ in part.named_parameters()] == [
        "list.0", "list.1", "dict.parametrizations.a.original", "dict.parametrizations.b.original",
    ]  # fmt: skip
    torch.testing.assert_close(part(x), model(x))
    assert described(bake(part)) == described(model)


def test_lists_and_dicts_of_parameters_still_behave_as_such() -> None:
    new = rewrite(Listed(), spec("**"), capture="module")
    assert (len(new.list), list(new.dict), new.list[-1].shape) == (2, ["a", "b"], (4, 4))
    assert "a" in new.dict
    assert [tensor.shape for tensor in new.dict.values()] == [(4, 4), (4, 4)]
    assert "ParameterList" in repr(new)
    assert isinstance(new.list, nn.ParameterList)


@CAPTURES
def test_running_statistics_are_refused(capture: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(PlanError, match=r"0.running_var is a running statistic.*(\n.*)*`except`"):
        rewrite(model, spec("0.running_var"), capture=capture)
    new = rewrite(model, spec("0.weight"), capture=capture)
    x = torch.randn(8, 4)
    new(x), model(x)
    assert torch.equal(new.get_submodule("0").running_mean, model[0].running_mean)
    assert int(new.get_submodule("0").num_batches_tracked) == 1


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "in place": lambda total, x: total.add_(x.sum(0)),
    "by operator": lambda total, x: operator.iadd(total, x.sum(0)),
    "by index": lambda total, x: operator.setitem(total, 0, x.sum()),
    "as an output": lambda total, x: torch.add(total, x.sum(0), out=total),
    "through a view": lambda total, x: total.view(2, 2)[0].add_(x.sum()),
    "by torch.nn.init": lambda total, x: nn.init.constant_(total, 0.5),
    "detached": lambda total, x: total.detach().copy_(x.sum(0)),
}


class Accumulating(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how in WRITES:
            WRITES[self.how](self.total, x)
        else:
            self.total = self.total + x.sum(0)
        return x + self.total


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("capture", ["graph", "module", "export"])
def test_a_buffer_written_in_place_is_refused(capture: str, how: str) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(RewriterError, match=r"the forward change[sd] total in place.*cannot keep the change"):
        rewrite(Accumulating(how), spec("total"), capture=capture, example_inputs=(x,))(x)


class Clamping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.fc.weight.data.clamp_(-0.1, 0.1)
        return self.fc(x)


def test_a_parameter_written_in_place_is_refused() -> None:
    with pytest.raises(
        RewriterError, match=r"the forward changes fc\.weight in place \(clamp_\).*\n.*a step of the chain"
    ):
        rewrite(Clamping(), spec("fc.weight"))


@CAPTURES
def test_a_buffer_that_is_assigned_keeps_what_it_is_given(capture: str) -> None:
    model, x = Accumulating("assigned"), torch.randn(3, 4)
    new = rewrite(model, spec("total"), capture=capture)
    for _ in range(3):
        torch.testing.assert_close(new(x), model(x))
    torch.testing.assert_close(bake(new).total, model.total)


@CAPTURES
def test_lazy_modules_are_refused_until_they_have_run(capture: str) -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(PlanError, match=r"lazy module.*\n.*run the model once"):
        rewrite(model, spec("0.weight"), capture=capture)
    with pytest.raises(PlanError, match=r"0\.weight has no shape until the model has run once"):
        rewrite(model, spec({"path": "*", "ndim": 2}), capture=capture)
    x = torch.randn(3, 5)
    model(x)
    torch.testing.assert_close(rewrite(model, spec("0.weight"), capture=capture)(x), model(x))


@CAPTURES
@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_made_in_inference_mode_can_be_trained_once_rewritten(capture: str, inplace: bool) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4, bias=False))
    new = rewrite(model, spec("0.weight"), capture=capture, inplace=inplace)
    new(torch.randn(3, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())


# Memory


@CAPTURES
def test_channels_last_stays(capture: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    new = rewrite(model, spec("0.weight"), capture=capture)
    plain = bake(new)
    assert plain[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert plain[0].weight.stride() == model[0].weight.stride()
    assert new.state_dict()["0.parametrizations.weight.original"].stride() == model[0].weight.stride()


@pytest.mark.parametrize("weight", [torch.randn(5, 4).t()[:, :4], torch.randn(4, 1).expand(4, 4)])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_parameter_without_memory_of_its_own_becomes_contiguous(weight: Tensor, inplace: bool) -> None:
    model, x = Product(w=nn.Parameter(weight)), torch.randn(3, 4)
    expected = model(x)
    new = rewrite(model, spec("w"), inplace=inplace)
    torch.testing.assert_close(new(x), expected)
    plain = bake(new)
    assert plain.w.is_contiguous()
    torch.testing.assert_close(plain(x), expected)


def test_what_shares_memory_with_a_selected_parameter_does_not_change() -> None:
    flat = torch.randn(32)
    model = Product(w=nn.Parameter(flat[:16].view(4, 4)), v=nn.Parameter(flat[8:24].view(4, 4)))
    w, v = model.w, model.v.detach().clone()
    new = rewrite(model, spec("w", "symmetric", init="keep"), inplace=True)
    assert torch.equal(new.v, v)
    assert any(parameter is w for parameter in new.parameters())
    with torch.no_grad():
        w.zero_()
    assert torch.equal(new.v, v)


# Meta


@pytest.mark.parametrize("capture", ["auto", pytest.param("module", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "step",
    [
        "symmetric", "skew", "weight_norm", "spectral_norm", {"lora": {"r": 2}},
        *({"orthogonal": {"map": map}} for map in ("matrix_exp", "cayley", "householder")),
    ],
    ids=str,
)  # fmt: skip
def test_models_without_memory_are_rewritten_and_filled_later(step: Any, capture: str) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    rules, x = spec("*.weight", step), torch.randn(3, 4)
    real = rewrite(build(), rules, capture=capture).eval()
    with torch.device("meta"):
        model = build()
    assert all(site.moved is None for site in plan(model, rules, capture=capture))
    new = rewrite(model, rules, capture=capture).eval()
    assert all(tensor.is_meta for tensor in (*new.parameters(), *new.buffers()))
    assert all(tensor.is_meta for tensor in bake(new).state_dict().values())
    filled = copy.deepcopy(new).to_empty(device="cpu")
    filled.load_state_dict(real.state_dict())
    new.load_state_dict(real.state_dict(), assign=True)
    for one in (new, filled):
        torch.testing.assert_close(one(x), real(x))
        torch.testing.assert_close(bake(one)(x), real(x))
