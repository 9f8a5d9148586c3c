from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

from rewriter import bake, rewrite
from rewriter.errors import RewriterError
from rewriter.parametrizations import Grassmann, Orthogonal, SpecialOrthogonal, Stiefel, _orthogonal
from rewriter.parametrizations._torch import Orthogonal as TorchOrthogonal
from rewriter.state import convert_state_dict, get_value

MAPS = ("matrix_exp", "cayley", "householder")
SHAPES = [
    (1, 1),
    (4, 4),
    (6, 2),
    (2, 6),
    (5, 4),
    (3, 5, 2),
    (2, 3, 3),
    (70, 70),
    (80, 20),
    pytest.param((90, 80), marks=pytest.mark.slow),
    pytest.param((140, 140), marks=pytest.mark.slow),
]


def error(Q: Tensor) -> float:
    """Return |Q^H Q - I|, or |Q Q^H - I| where Q is wide."""
    Q = Q.mH if Q.size(-2) < Q.size(-1) else Q
    return float((Q.mH @ Q - torch.eye(Q.size(-1), dtype=Q.dtype)).abs().max().detach())


def stored(map: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
    """Return a tensor to start from, with signs on the diagonal where the Householder map reads them."""
    X = scale * torch.randn(*shape, dtype=dtype)
    if map == "householder":
        diagonal = X.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(diagonal.sign())
    return X.requires_grad_()


@pytest.mark.parametrize("trivialization", [True, False])
@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_torch(map: str, shape: tuple[int, ...], trivialization: bool) -> None:
    weight = torch.randn(*shape, dtype=torch.float64)
    ours = Orthogonal(map, trivialization, weight=weight)  # type: ignore[arg-type]
    theirs = TorchOrthogonal(weight, map, trivialization)  # type: ignore[arg-type]
    if trivialization:
        assert torch.equal(ours.right_inverse(weight), theirs.right_inverse(weight))
        theirs.load_state_dict(ours.state_dict())
    for scale in (0.0, 1e-3, 0.1, 1.0, 4.0):
        X = stored(map, shape, torch.float64, scale / math.sqrt(max(shape)))
        if map == "householder" and scale == 0:
            X.data.diagonal(dim1=-2, dim2=-1).fill_(-1)
        G = torch.randn(*shape, dtype=torch.float64)
        one, other = ours(X), theirs(X)
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
        grads = [torch.autograd.grad(value, X, G)[0] for value in (one, other)]
        torch.testing.assert_close(grads[0], grads[1], atol=1e-10, rtol=0)
        assert error(one) <= max(error(other), 10 * max(shape) * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("map", ["matrix_exp", "cayley"])
@pytest.mark.parametrize("shape", [(4, 4), (6, 2), (2, 5)], ids=str)
def test_complex_values_and_gradients_are_those_of_torch(map: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(*shape, dtype=torch.complex128)
    ours = Orthogonal(map, weight=weight)  # type: ignore[arg-type]
    theirs = TorchOrthogonal(weight, map)  # type: ignore[arg-type]
    ours.right_inverse(weight), theirs.right_inverse(weight)
    theirs.load_state_dict(ours.state_dict())
    X = torch.randn(*shape, dtype=torch.complex128, requires_grad=True)
    G = torch.randn(*shape, dtype=torch.complex128)
    torch.testing.assert_close(ours(X), theirs(X), atol=1e-10, rtol=0)
    grads = [torch.autograd.grad(step(X), X, G)[0] for step in (ours, theirs)]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-10, rtol=0)


def test_state_dicts_are_interchangeable_with_torch() -> None:
    torch_layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(4, 7).double())
    ours = torch.nn.Linear(4, 7).double()
    parametrize.register_parametrization(ours, "weight", Orthogonal(weight=ours.weight), unsafe=True)
    assert list(ours.state_dict()) == list(torch_layer.state_dict())
    ours.load_state_dict(torch_layer.state_dict())
    torch.testing.assert_close(ours.weight, torch_layer.weight)


def test_without_a_base_there_is_no_base_in_the_state_dict() -> None:
    assert list(Orthogonal(trivialization=False, weight=torch.eye(3)).state_dict()) == []


@pytest.mark.parametrize("shape", [(5, 5), (6, 3), (3, 6)], ids=str)
def test_householder_right_inverse_without_a_base_is_that_of_torch(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, dtype=torch.float64)
    ours = Orthogonal("householder", False, weight=weight)
    theirs = TorchOrthogonal(weight, "householder", False)
    torch.testing.assert_close(ours.right_inverse(weight), theirs.right_inverse(weight))


@pytest.mark.parametrize("map", MAPS)
@settings(max_examples=15)
@given(m=st.integers(1, 9), n=st.integers(1, 9), batch=st.integers(0, 2), scale=st.floats(0, 20))
def test_the_value_is_orthogonal_wherever_the_tensor_goes(map: str, m: int, n: int, batch: int, scale: float) -> None:
    weight = torch.randn(*([batch] if batch else []), m, n)
    step = Orthogonal(map, weight=weight)  # type: ignore[arg-type]
    X = step.right_inverse(weight) + scale * torch.randn_like(weight)
    assert error(step(X)) < 10 * max(m, n) * torch.finfo(torch.float32).eps * (1 + scale)


@pytest.mark.parametrize("map", MAPS)
def test_the_value_stays_orthogonal_while_it_is_trained(map: str) -> None:
    target = torch.linalg.qr(torch.randn(8, 8))[0][:, :5]
    weight = torch.randn(8, 5)
    step = Orthogonal(map, weight=weight)  # type: ignore[arg-type]
    X = torch.nn.Parameter(step.right_inverse(weight))
    optimizer = torch.optim.Adam([X], lr=0.05, weight_decay=0.1)
    first = (step(X) - target).square().sum().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = (step(X) - target).square().sum()
        loss.backward()
        optimizer.step()
    assert error(step(X)) < 1e-5
    assert loss.item() < first / 2


def test_a_decayed_diagonal_does_not_flip_or_zero_columns() -> None:
    weight = torch.randn(4, 3)
    step = Orthogonal("householder", weight=weight)
    X = step.right_inverse(weight)
    torch.testing.assert_close(step(0.3 * X), step(X))
    torch.testing.assert_close(step(-0.1 * X), step(X))


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("shape", [(5, 5), (6, 2)], ids=str)
def test_moving_the_base_keeps_the_value(map: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, dtype=torch.float64)
    step = Orthogonal(map, weight=weight)  # type: ignore[arg-type]
    X = step.right_inverse(weight) + 0.3 * torch.randn_like(weight)
    before = step(X)
    moved = step.update_base(X)
    torch.testing.assert_close(step(moved), before)
    assert torch.equal(moved, step.right_inverse(before))


@pytest.mark.parametrize("seed", range(4))
def test_every_rotation_has_a_logarithm(seed: int) -> None:
    torch.manual_seed(seed)
    special = SpecialOrthogonal(weight=torch.empty(8, 8, dtype=torch.float64)).sample()
    half_turns = torch.diag(torch.tensor([-1.0, -1, 1, -1, -1, 1, 1, 1], dtype=torch.float64))
    nearly = torch.matrix_exp((math.pi - 1e-9) * torch.tensor([[0.0, 1], [-1, 0]], dtype=torch.float64))
    permutation = torch.roll(torch.eye(7, dtype=torch.float64), 1, 0)
    for Q in (special, special @ half_turns @ special.mT, -torch.eye(4).double(), nearly, permutation):
        step = Orthogonal("matrix_exp", False, weight=Q)
        torch.testing.assert_close(step(step.right_inverse(Q)), Q, atol=1e-10, rtol=0)


@pytest.mark.parametrize("map", ["matrix_exp", "cayley"])
def test_a_reflection_is_refused_where_no_tensor_stands_for_it(map: str) -> None:
    reflection = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    step = Orthogonal(map, False, weight=reflection)  # type: ignore[arg-type]
    with pytest.raises(RewriterError, match=r"determinant is -1.*trivialization: true"):
        step.right_inverse(reflection)
    with pytest.raises(RewriterError, match="no rotation"):
        SpecialOrthogonal(map, weight=reflection).right_inverse(reflection)  # type: ignore[arg-type]


def test_cayley_refuses_a_half_turn() -> None:
    half_turn = -torch.eye(2)
    with pytest.raises(RewriterError, match="eigenvalue -1"):
        Orthogonal("cayley", False, weight=half_turn).right_inverse(half_turn)


def test_tall_exponentials_say_that_they_have_no_right_inverse() -> None:
    step = Orthogonal("matrix_exp", False, weight=torch.empty(5, 2))
    with pytest.raises(NotImplementedError, match="trivialization: true"):
        step.right_inverse(torch.randn(5, 2))


def test_an_unknown_map_and_another_shape_are_errors() -> None:
    with pytest.raises(RewriterError, match="matrix_exp, cayley or householder"):
        Orthogonal("qr", weight=torch.eye(3))  # type: ignore[arg-type]
    with pytest.raises(RewriterError, match=r"made for shape \[3, 3\], got \[2, 2\]"):
        Orthogonal(weight=torch.eye(3)).right_inverse(torch.eye(2))


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (2, 6, 4), (4, 4)], ids=str)
def test_stiefel_has_the_values_of_orthogonal_with_a_small_base(map: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(*shape, dtype=torch.float64)
    thin = Stiefel(map, weight=weight)  # type: ignore[arg-type]
    full = Orthogonal(map, weight=weight)  # type: ignore[arg-type]
    X = thin.right_inverse(weight)
    assert torch.equal(X, full.right_inverse(weight))
    torch.testing.assert_close(thin(X), full(X))
    torch.testing.assert_close(thin.update_base(X), X)
    assert thin.base is not None
    assert thin.base.numel() == weight.numel()


def test_grassmann_does_not_read_motions_within_the_subspace() -> None:
    weight = torch.randn(6, 2)
    step = Grassmann(weight=weight)
    X = step.right_inverse(weight)
    inside = torch.zeros(6, 2)
    inside[:2] = torch.randn(2, 2)
    torch.testing.assert_close(step(X + inside), step(X))
    with pytest.raises(RewriterError, match="span all of the space"):
        Grassmann(weight=torch.eye(3))


def test_samples_have_random_signs_and_rotations_determinant_one() -> None:
    signs = [torch.linalg.det(Orthogonal(weight=torch.empty(3, 3)).sample()).sign().item() for _ in range(30)]
    assert {-1.0, 1.0} == set(signs)
    for _ in range(10):
        R = SpecialOrthogonal(weight=torch.empty(4, 4, dtype=torch.float64)).sample()
        assert math.isclose(torch.linalg.det(R).item(), 1.0, abs_tol=1e-12)


@pytest.mark.parametrize("map", MAPS)
def test_half_precision_weights_are_rounded_once(map: str) -> None:
    weight = torch.randn(6, 6, dtype=torch.bfloat16)
    half, full = (Orthogonal(map, weight=weight.to(t)) for t in (torch.bfloat16, torch.float32))  # type: ignore[arg-type]
    X = half.right_inverse(weight)
    full.load_state_dict(half.state_dict())
    assert torch.equal(half(X), full(X.float()).bfloat16())


def test_autocast_does_not_round_the_map() -> None:
    weight = torch.randn(6, 6)
    step = Orthogonal(weight=weight)
    X = step.right_inverse(weight) + 0.1
    with torch.autocast("cpu", torch.bfloat16):
        inside = step(X)
    assert torch.equal(inside, step(X))


@pytest.mark.parametrize("map", MAPS)
def test_functional_transforms_see_through_the_map(map: str) -> None:
    weight = torch.randn(4, 4, dtype=torch.float64)
    step = Orthogonal(map, weight=weight)  # type: ignore[arg-type]
    X = torch.randn(3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(step)(X), torch.stack([step(x) for x in X]))
    one = X[0].clone().requires_grad_()
    gradient = torch.autograd.grad(step(one)[0, 1], one)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: step(x)[0, 1])(X[0]), gradient)
    _, forward = torch.func.jvp(step, (X[0],), (X[1],))
    wanted = torch.func.jacrev(step)(X[0])
    torch.testing.assert_close(forward, torch.einsum("abcd,cd->ab", wanted, X[1]))


def test_infinite_and_missing_numbers_come_through_as_such() -> None:
    for map in MAPS:
        X = torch.full((3, 3), math.nan)
        assert Orthogonal(map, weight=torch.eye(3))(X).isnan().any()  # type: ignore[arg-type]


def test_copies_do_not_share_the_base() -> None:
    step = Orthogonal(weight=torch.eye(3))
    other = copy.deepcopy(step)
    other.right_inverse(torch.randn(3, 3))
    assert torch.equal(step.base, torch.eye(3))  # type: ignore[arg-type]


def test_a_very_tall_weight_has_a_base_of_its_own_shape() -> None:
    for shape in ((30_000, 50), (50, 30_000)):
        step = Orthogonal(weight=torch.empty(shape))
        assert step.base is not None
        assert step.base.shape == (30_000, 50)
        Q = step.sample()
        torch.testing.assert_close(step(step.right_inverse(Q)), Q, atol=1e-5, rtol=0)
    assert Orthogonal(weight=torch.empty(2047, 4)).base.shape == (2047, 2047)  # type: ignore[union-attr]
    assert Orthogonal(weight=torch.empty(2048, 257)).base.shape == (2048, 2048)  # type: ignore[union-attr]
    assert Orthogonal(weight=torch.empty(2048, 2, dtype=torch.complex64)).base.shape == (2048, 2048)  # type: ignore[union-attr]


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("shape", [(24, 3), (3, 24)])
def test_a_very_tall_weight_has_the_values_of_torchs_state_dict(
    map: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_orthogonal, "_VERY_TALL", 24)  # torch takes a minute for 2048
    layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "0.weight", "chain": [{"orthogonal": {"map": map}}]}]}
    new = rewrite(torch.nn.Sequential(copy.deepcopy(layer)), spec)
    small = copy.deepcopy(new.state_dict())
    theirs = torch.nn.Sequential(parametrizations.orthogonal(layer, orthogonal_map=map))
    with torch.no_grad():
        theirs[0].parametrizations.weight.original += 0.1 * torch.randn(shape, dtype=torch.float64).tril(-1)
    new.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(get_value(new, "0.weight"), theirs[0].weight)
    x = torch.randn(4, shape[1], dtype=torch.float64)
    torch.testing.assert_close(bake(new)(x), theirs(x))
    assert {key: tensor.shape for key, tensor in new.state_dict().items()} == {
        key: tensor.shape for key, tensor in theirs.state_dict().items()
    }
    new.load_state_dict(small)
    assert new.state_dict()["0.parametrizations.weight.0.base"].shape == (24, 3)
    with torch.no_grad():
        new.get_parameter("0.parametrizations.weight.original").add_(0.1 * torch.randn(shape).tril(-1))
    theirs.load_state_dict(convert_state_dict(new.state_dict(), new, to="torch"))
    torch.testing.assert_close(theirs[0].weight, get_value(new, "0.weight"))


def test_a_base_of_a_wrong_shape_is_refused() -> None:
    step = Orthogonal(weight=torch.empty(6, 2))
    with pytest.raises(RuntimeError, match="size mismatch for base"):
        step.load_state_dict({"base": torch.zeros(6, 3)})
    assert step.base is not None
    assert step.base.shape == (6, 6)
