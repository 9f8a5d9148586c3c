from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

from rewriter import rewrite
from rewriter.errors import RewriterError
from rewriter.parametrizations import ConvSpectralNorm, SpectralNorm, WeightNorm
from rewriter.parametrizations._torch import SpectralNorm as TorchSpectralNorm
from rewriter.state import get_value


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_weight_norm_has_the_values_and_gradients_of_torch(dim: int | None) -> None:
    weight = torch.randn(3, 4, 5, dtype=torch.float64)
    theirs = parametrizations._WeightNorm(dim)
    ours = WeightNorm(dim, weight=weight)
    g, v = (part.clone().requires_grad_() for part in ours.right_inverse(weight))
    for mine, other in zip((g, v), theirs.right_inverse(weight), strict=True):
        torch.testing.assert_close(mine, other)
    G = torch.randn_like(weight)
    torch.testing.assert_close(ours(g, v), theirs(g, v))
    for mine, other in zip(
        torch.autograd.grad(ours(g, v), (g, v), G), torch.autograd.grad(theirs(g, v), (g, v), G), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3, None])
@pytest.mark.parametrize("zero", [False, True])
def test_weight_norm_is_the_same_evaluated_traced_and_scripted(dim: int | None, zero: bool) -> None:
    weight = torch.randn(3, 4, 5, dtype=torch.float64)
    step = WeightNorm(dim, weight=weight)
    g, v = (part.clone() for part in step.right_inverse(weight))
    if zero:
        v[1], v[..., 2] = 0, 0
    g, v = g.requires_grad_(), v.requires_grad_()
    G, H = torch.randn_like(weight), torch.randn_like(weight)

    def found(run: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        value = run(g, v)
        first = torch.autograd.grad(value, (g, v), G, create_graph=True)
        second = torch.autograd.grad((first[1] * H).sum() + first[0].sum(), (g, v))
        return [value, *torch.autograd.grad(run(g, v), (g, v), G), *first, *second]

    expected, given = found(step._value), found(step)
    assert all(one.isfinite().all() for one in given)
    # At zero slices, the traced form has no second derivative.
    known = 5 if zero else 7
    torch.testing.assert_close(given[:known], expected[:known], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found(torch.jit.script(step))[:known], expected[:known], atol=1e-12, rtol=1e-10)


def test_weight_norm_of_frozen_parts_has_the_other_gradient() -> None:
    step = WeightNorm(weight=torch.randn(3, 4))
    g, v = torch.randn(3, 1), torch.randn(3, 4)
    for one in (g, v):
        one.requires_grad_()
        (gradient,) = torch.autograd.grad(step(g, v).sum(), one)
        torch.testing.assert_close(gradient, torch.autograd.grad(step._value(g, v).sum(), one)[0])
        one.requires_grad_(False)


def test_weight_norm_has_forward_derivatives() -> None:
    step = WeightNorm(weight=torch.randn(3, 4, dtype=torch.float64))
    g, v, T = torch.randn(3, 1).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    with torch.autograd.forward_ad.dual_level():
        value = step(g, torch.autograd.forward_ad.make_dual(v, T))
        tangent = torch.autograd.forward_ad.unpack_dual(value).tangent
    rows = torch.func.vmap(lambda V: step(g, V))(torch.stack([v, T]))
    torch.testing.assert_close(rows[1], step(g, T))
    torch.testing.assert_close(tangent, (step(g, v + 1e-6 * T) - step(g, v - 1e-6 * T)) / 2e-6, atol=1e-7, rtol=1e-6)


@settings(max_examples=30)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_weight_norm_slices_have_the_norms_g_for_every_dim(shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    weight = torch.randn(*shape, dtype=torch.float64)
    step = WeightNorm(dim, weight=weight)
    g, v = step.right_inverse(weight)
    torch.testing.assert_close(step(g, v), weight)
    W = step(2 * g, 3 * v)
    torch.testing.assert_close(W.movedim(dim, 0).reshape(W.size(dim), -1).norm(dim=1), 2 * g.flatten().abs())


def test_weight_norm_of_a_zero_row_is_zero_and_can_leave_it() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    step = WeightNorm(weight=weight)
    g, v = (part.requires_grad_() for part in step.right_inverse(weight))
    W = step(g, v)
    assert torch.equal(W, weight)
    for gradient in torch.autograd.grad(W.sum(), (g, v)):
        assert gradient.isfinite().all()
    (towards,) = torch.autograd.grad(step(g, v).sum(), g)
    assert towards[1] != 0
    still = torch.zeros(2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(step(g, still).sum(), still)
    assert gradient.isfinite().all()


def test_weight_norm_state_dicts_are_interchangeable_with_torch() -> None:
    theirs = parametrizations.weight_norm(nn.Linear(3, 4))
    ours = nn.Linear(3, 4)
    parametrize.register_parametrization(ours, "weight", WeightNorm(weight=ours.weight), unsafe=True)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_norms_refuse_dimensions_that_do_not_exist() -> None:
    with pytest.raises(RewriterError, match=r"dim 2 is out of range for shape \[3, 4\]"):
        WeightNorm(2, weight=torch.ones(3, 4))
    with pytest.raises(RewriterError, match=r"dim -3 is out of range for shape \[3, 4\]"):
        SpectralNorm(dim=-3, weight=torch.ones(3, 4))
    with pytest.raises(RewriterError, match="n_power_iterations must be positive"):
        SpectralNorm(0, weight=torch.ones(3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_spectral_norm_advances_and_differentiates_as_torch_does(dim: int, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 3, 5, dtype=dtype)
    torch.manual_seed(7)
    theirs = TorchSpectralNorm(weight, 2, dim)
    torch.manual_seed(7)
    ours = SpectralNorm(2, dim, weight=weight)
    stored = ours.right_inverse(weight).requires_grad_()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        one, other = ours(stored), theirs(stored)
        torch.testing.assert_close(one, other)
        G = torch.randn_like(weight)
        grads = [torch.autograd.grad(value, stored, G)[0] for value in (one, other)]
        torch.testing.assert_close(grads[0], grads[1])
        for key, buffer in ours.state_dict().items():
            torch.testing.assert_close(buffer, theirs.state_dict()[key])


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_spectral_norm_has_the_second_derivatives_of_torch(dim: int) -> None:
    weight = torch.randn(4, 3, 2, dtype=torch.float64)
    theirs, ours = TorchSpectralNorm(weight, 1, dim), SpectralNorm(1, dim, weight=weight)
    ours.load_state_dict(theirs.state_dict())
    stored, G = weight.clone().requires_grad_(), torch.randn_like(weight).requires_grad_()
    seconds = []
    for step in (ours, theirs):
        first = torch.autograd.grad(step(stored), stored, G, create_graph=True)[0]
        seconds.append(torch.autograd.grad(first.square().sum(), (stored, G)))
    torch.testing.assert_close(seconds[0], seconds[1])


def test_spectral_norm_gives_the_gradients_of_a_batch() -> None:
    step = SpectralNorm(weight=torch.randn(4, 3, dtype=torch.float64))
    X, G = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, 3, dtype=torch.float64)
    value = step(X)
    (together,) = torch.autograd.grad(value, X, G, retain_graph=True, is_grads_batched=True)
    alone = [torch.autograd.grad(value, X, g, retain_graph=True)[0] for g in G]
    torch.testing.assert_close(together, torch.stack(alone))


def test_spectral_norm_of_large_and_small_numbers() -> None:
    for size in (1e-9, 1e15):
        X = size * torch.randn(6, 4)
        step = SpectralNorm(n_power_iterations=3, weight=X)
        step.right_inverse(X)
        assert torch.linalg.matrix_norm(step(X), 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("size", [2e-12, 3e-11, 1e-9, 1e9, 1e15])
def test_spectral_norm_of_large_and_small_numbers_has_the_gradient_of_the_wider_dtype(size: float) -> None:
    X, G = size * torch.randn(6, 4), torch.randn(6, 4)
    step = SpectralNorm(weight=X)
    wide = SpectralNorm(weight=X.double())
    wide.load_state_dict(step.state_dict())
    narrow, exact = X.requires_grad_(), X.detach().double().requires_grad_()
    values = step(narrow), wide(exact)
    torch.testing.assert_close(values[0].double(), values[1], atol=1e-6, rtol=1e-5)
    found = torch.autograd.grad(values[0], narrow, G)[0].double()
    torch.testing.assert_close(
        found * size, torch.autograd.grad(values[1], exact, G.double())[0] * size, atol=1e-5, rtol=1e-5
    )


def test_spectral_norm_is_the_same_evaluated_and_scripted() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    step = SpectralNorm(weight=weight)
    scripted = torch.jit.script(copy.deepcopy(step))
    for X in (weight, torch.zeros_like(weight), torch.randn_like(weight)):
        X.requires_grad_()
        G = torch.randn_like(weight)
        values = [run(X) for run in (step, scripted)]
        torch.testing.assert_close(values[0], values[1])
        grads = [torch.autograd.grad(value, X, G)[0] for value in values]
        torch.testing.assert_close(grads[0], grads[1])
        torch.testing.assert_close(step.state_dict(), scripted.state_dict())


def test_spectral_norm_follows_an_assigned_value() -> None:
    step = SpectralNorm(weight=torch.randn(20, 30)).eval()
    other = 5 * torch.randn(20, 30)
    assert torch.linalg.matrix_norm(step(step.right_inverse(other)), 2).item() == pytest.approx(1, abs=1e-3)


def test_spectral_norm_keeps_a_graph_valid_over_two_forwards() -> None:
    step = SpectralNorm(weight=torch.randn(4, 3))
    X = torch.randn(4, 3, requires_grad=True)
    (step(X).sum() + step(X).square().sum()).backward()
    assert X.grad is not None


def test_spectral_norm_of_zero_is_zero_and_recovers() -> None:
    step = SpectralNorm(weight=torch.zeros(3, 3))
    X = torch.zeros(3, 3, requires_grad=True)
    value = step(X)
    assert torch.equal(value, torch.zeros(3, 3))
    assert torch.autograd.grad(value.sum(), X)[0].isfinite().all()
    later = torch.randn(3, 3)
    for _ in range(100):
        value = step(later)
    assert torch.linalg.matrix_norm(value, 2).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("step", ["spectral_norm", "torch.SpectralNorm", "weight_norm", "torch.WeightNorm"])
@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose1d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.Linear(4, 6)], ids=repr
)
def test_the_dimension_of_outputs_is_torchs(step: str, layer: nn.Module) -> None:
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "0.weight", "chain": [step]}]}
    new = rewrite(nn.Sequential(copy.deepcopy(layer)), spec).eval()
    norm = parametrizations.spectral_norm if "pectral" in step else parametrizations.weight_norm
    reference = nn.Sequential(norm(copy.deepcopy(layer))).eval()
    new.load_state_dict(reference.state_dict())
    torch.testing.assert_close(get_value(new, "0.weight"), reference[0].weight)


def test_a_dimension_that_is_given_wins_over_the_layer() -> None:
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "0.weight", "chain": [{"spectral_norm": {"dim": 0}}]}]}
    new = rewrite(nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), spec)
    assert new.state_dict()["0.parametrizations.weight.0._u"].shape == (4,)


@pytest.mark.parametrize(
    "step",
    [SpectralNorm(weight=torch.eye(8)), ConvSpectralNorm([5], weight=torch.eye(8)[..., None])],
    ids=["spectral_norm", "conv_spectral_norm"],
)
def test_the_norms_of_averaged_singular_vectors_do_not_matter(step: SpectralNorm) -> None:
    weight = torch.randn(step.shape)
    step.right_inverse(weight)
    expected = step.eval()(weight)
    for buffer in step.buffers():
        buffer.mul_(0.25)
    torch.testing.assert_close(step(weight), expected)
    assert torch.equal(step(torch.zeros(step.shape)), torch.zeros(step.shape))


def test_averaged_models_keep_the_spectral_norm_near_one() -> None:
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "*.weight", "chain": ["spectral_norm"]}]}
    new = rewrite(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), spec)
    average = AveragedModel(new, use_buffers=True)
    for _ in range(5):
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.add_(torch.randn_like(parameter))
        for _ in range(8):
            new(torch.randn(2, 16))
        average.update_parameters(new)
    average.eval()
    assert torch.linalg.matrix_norm(get_value(average.module, "0.weight"), 2) < 1.3


@pytest.mark.parametrize("given", ["parameters", "parameters and buffers"])
@pytest.mark.parametrize("capture", ["graph", "module"])
def test_spectral_norm_differentiated_by_torch_func_is_torchs(capture: str, given: str) -> None:
    theirs = parametrizations.spectral_norm(nn.Linear(3, 9, dtype=torch.float64))
    plain = nn.Sequential(nn.Linear(3, 9, dtype=torch.float64))
    rule = {"name": "r", "select": "0.weight", "chain": ["spectral_norm"]}
    ours = rewrite(plain, {"reparam": 1, "rules": [rule]}, capture=capture)
    ours.load_state_dict({f"0.{name}": tensor for name, tensor in theirs.state_dict().items()})
    x = torch.randn(2, 3, dtype=torch.float64)
    found = []
    for model in (nn.Sequential(theirs), ours):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()} if "buffers" in given else {}

        def loss(
            parameters: dict[str, Tensor], model: nn.Module = model, buffers: dict[str, Tensor] = buffers
        ) -> Tensor:
            return torch.func.functional_call(model, (parameters, buffers), (x,)).square().sum()

        gradients = torch.func.grad(loss)({name: tensor.detach() for name, tensor in model.named_parameters()})
        found.append((gradients, dict(model.named_buffers()), buffers))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "step", ["spectral_norm", {"conv_spectral_norm": {"input_size": [4, 4]}}], ids=["plain", "conv"]
)
def test_a_buffer_that_advances_has_no_value_for_each_example_of_vmap(step: str | dict[str, object]) -> None:
    rule = {"name": "r", "select": "0.weight", "chain": [step]}
    model = rewrite(nn.Sequential(nn.Conv2d(2, 2, 3)), {"reparam": 1, "rules": [rule]})
    parameters, buffers = torch.func.stack_module_state([model, copy.deepcopy(model)])
    x = torch.randn(1, 2, 4, 4)

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (x,))

    with pytest.raises(RewriterError, match="give functional_call the buffers too"):
        torch.vmap(run, (0, None))(parameters, {})
    together = torch.vmap(run)(parameters, buffers)
    torch.testing.assert_close(together[1], model(x))
