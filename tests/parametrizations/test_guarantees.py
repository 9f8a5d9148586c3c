"""What each family guarantees, for random shapes, far out, and while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import construct, find

EPS = torch.finfo(torch.float32).eps


def symmetric(W: Tensor) -> bool:
    return torch.equal(W, W.mT)


def least_eigenvalue(W: Tensor) -> float:
    return torch.linalg.eigvalsh(W.double()).min().item()


def norm(W: Tensor) -> float:
    return W.abs().max().item() + 1


def determinant_is_one(W: Tensor) -> bool:
    sign, log = torch.linalg.slogdet(W.double())
    condition = torch.linalg.cond(W.double()).max().item()
    # One rounding of a matrix moves its determinant by its condition number times that.
    rounding = 20 * W.size(-1) ** 2 * EPS * condition
    return rounding > 0.1 or (bool((sign > 0).all()) and log.abs().max().item() < rounding)


def hyperboloid(W: Tensor) -> bool:
    W = W.double()
    left = W[..., 0] ** 2 - W[..., 1:].square().sum(-1) - 1
    return bool((left.abs() <= 8 * EPS * W[..., 0] ** 2).all() and (W[..., 0] > 0).all())


SQUARE: list[tuple[str, dict[str, Any], Callable[[Tensor], bool]]] = [
    ("symmetric", {}, symmetric),
    ("skew", {}, lambda W: torch.equal(W, -W.mT)),
    ("psd", {}, lambda W: symmetric(W) and least_eigenvalue(W) > -20 * W.size(-1) * EPS * norm(W)),
    ("psd", {"rank": 1}, lambda W: bool((torch.linalg.matrix_rank(W, rtol=1e-4) <= 1).all())),
    ("psd", {"fixed": True}, lambda W: least_eigenvalue(W) > -20 * W.size(-1) * EPS * norm(W)),
    ("spd", {"eps": 0.5}, lambda W: least_eigenvalue(W) > 0.5 - 20 * W.size(-1) * EPS * norm(W)),
    ("correlation", {}, lambda W: bool(((W.diagonal(dim1=-2, dim2=-1) - 1).abs() < 8 * EPS).all())),
    ("correlation", {}, lambda W: least_eigenvalue(W) > -20 * W.size(-1) * EPS),
    ("sl", {}, determinant_is_one),
    ("special_orthogonal", {}, lambda W: bool((torch.linalg.det(W.double()) > 0.99).all())),
]
ANY: list[tuple[str, dict[str, Any], Callable[[Tensor], bool]]] = [
    ("triangular", {}, lambda W: torch.equal(W, W.tril())),
    ("triangular", {"upper": True, "strict": True}, lambda W: torch.equal(W, W.triu(1))),
    ("diagonal", {}, lambda W: torch.equal(W, W.tril().triu())),
    ("centred", {}, lambda W: bool((W.mean(-1).abs() <= 8 * EPS * norm(W)).all())),
    ("almost_orthogonal", {"radius": 0.25, "map": "cayley"}, lambda W: near_isometry(W, 0.25)),
    ("sphere", {"radius": 3.0}, lambda W: within(W.norm(dim=-1), 3, 3, 24 * EPS)),
    ("simplex", {}, lambda W: within(W.sum(-1), 1, 1, 16 * EPS) and within(W, 0, 1, 0)),
    ("positive", {"eps": 0.1}, lambda W: within(W, 0.1, float("inf"), 0)),
    ("positive", {"map": "exp"}, lambda W: within(W, 0, float("inf"), 0)),
    ("interval", {"low": -0.3, "high": 0.7}, lambda W: within(W, -0.3, 0.7, EPS)),
    ("interval", {"low": 2.0}, lambda W: within(W, 2, float("inf"), 0)),
    ("interval", {"high": -2.0}, lambda W: within(W, float("-inf"), -2, 0)),
    ("poincare_ball", {"curvature": 4.0}, lambda W: bool((2 * W.double().norm(dim=-1) < 1).all())),
    ("lorentz", {}, hyperboloid),
]


def near_isometry(W: Tensor, radius: float, far: float = 1.0) -> bool:
    return within(torch.linalg.svdvals(W.double()), 1 - radius, 1 + radius, 10 * max(W.shape[-2:]) * EPS * far)


def within(W: Tensor, low: float, high: float, slack: float) -> bool:
    return bool((low - slack <= W).all() and (high + slack >= W).all())


def built(name: str, arguments: dict[str, Any], weight: Tensor) -> nn.Module:
    return construct(find(name), weight, arguments)


def title(case: Any) -> str | None:
    return case if isinstance(case, str) else ""


@pytest.mark.parametrize(("name", "arguments", "holds"), SQUARE, ids=title)
@settings(max_examples=12)
@given(n=st.integers(1, 7), batch=st.integers(0, 2), scale=st.sampled_from([0.0, 0.1, 1.0, 5.0]))
def test_guarantees_of_square_families_hold(
    name: str, arguments: dict[str, Any], holds: Callable[[Tensor], bool], n: int, batch: int, scale: float
) -> None:
    X = scale * torch.randn(*([batch] if batch else []), n, n)
    assert holds(built(name, arguments, X)(X))


@pytest.mark.parametrize(("name", "arguments", "holds"), ANY, ids=title)
@settings(max_examples=12)
@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    batch=st.integers(0, 2),
    scale=st.sampled_from([0.0, 0.1, 1.0, 50.0]),
)
def test_guarantees_of_other_families_hold(
    name: str,
    arguments: dict[str, Any],
    holds: Callable[[Tensor], bool],
    m: int,
    n: int,
    batch: int,
    scale: float,
) -> None:
    X = scale * torch.randn(*([batch] if batch else []), m, n)
    assert holds(built(name, arguments, X)(X))


@pytest.mark.parametrize(
    ("name", "radius"),
    [("orthogonal", 0.0), ("special_orthogonal", 0.0), ("stiefel", 0.0), ("almost_orthogonal", 0.25)],
)
@settings(max_examples=12)
@given(n=st.integers(1, 6), scale=st.sampled_from([0.1, 1.0, 50.0, 1000.0]))
def test_the_exponential_rounds_by_the_size_of_its_tensor(name: str, radius: float, n: int, scale: float) -> None:
    X = scale * torch.randn(n, n)
    arguments: dict[str, Any] = {"radius": radius} if radius else {}
    assert near_isometry(built(name, arguments, X)(X), radius, 1 + X.norm().item())


@settings(max_examples=20)
@given(n=st.integers(1, 6), decay=st.sampled_from([0.0, 0.2, 1.0]))
def test_stable_matrices_decay_and_can_be_assigned(n: int, decay: float) -> None:
    step = built("hurwitz_stable", {"decay": decay}, torch.empty(n, n, dtype=torch.float64))
    far = step(*torch.randn(2, n, n, dtype=torch.float64))
    assert (torch.linalg.eigvals(far).real < -decay + 1e-12 * norm(far)).all()
    for _ in range(3):
        value = step.sample()  # type: ignore[operator]
        assert (torch.linalg.eigvals(value).real < -decay).all()
        torch.testing.assert_close(step(*step.right_inverse(value)), value, atol=1e-6, rtol=1e-6)  # type: ignore[operator]


def test_values_outside_of_a_space_are_refused_where_nothing_is_near() -> None:
    singular = torch.zeros(3, 3)
    reflection = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    for name in ("gl_plus", "sl"):
        for value in (singular, reflection):
            with pytest.raises(RewriterError, match="determinant must be positive"):
                built(name, {}, value).right_inverse(value)  # type: ignore[operator]
    with pytest.raises(RewriterError, match="real part"):
        built("hurwitz_stable", {}, torch.eye(3)).right_inverse(torch.eye(3))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "arguments", "value", "nearest"),
    [
        ("symmetric", {}, [[1.0, 4.0], [2.0, 3.0]], [[1.0, 3.0], [3.0, 3.0]]),
        ("skew", {}, [[1.0, 4.0], [2.0, 3.0]], [[0.0, 1.0], [-1.0, 0.0]]),
        ("psd", {}, [[2.0, 0.0], [0.0, -1.0]], [[2.0, 0.0], [0.0, 0.0]]),
        ("interval", {"low": 0.0, "high": 1.0}, [[2.0, -1.0]], [[1.0, 0.0]]),
        ("sphere", {}, [[3.0, 4.0], [0.0, 2.0]], [[0.6, 0.8], [0.0, 1.0]]),
        ("almost_orthogonal", {"radius": 0.5}, [[3.0, 0.0], [0.0, 1.2]], [[1.5, 0.0], [0.0, 1.2]]),
    ],
)
def test_a_value_outside_of_the_space_becomes_the_nearest_one(
    name: str, arguments: dict[str, Any], value: list[list[float]], nearest: list[list[float]]
) -> None:
    step = built(name, arguments, torch.tensor(value))
    found = step(step.right_inverse(torch.tensor(value)))  # type: ignore[operator]
    torch.testing.assert_close(found, torch.tensor(nearest), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("block_diagonal", {"blocks": 3}, "cannot be divided into 3 blocks"),
        ("triangular", {"strict": True, "unitriangular": True}, "give one of them"),
        ("almost_orthogonal", {"radius": 1.5}, r"radius must be in \(0, 1\]"),
        ("almost_orthogonal", {"radius": 0.5, "f": "cos"}, "sin or tanh"),
        ("sphere", {"radius": 0.0}, "radius must be positive"),
        ("positive", {"map": "relu"}, "softplus or exp"),
        ("positive", {"eps": -1.0}, "must not be negative"),
        ("interval", {}, "give `low`, `high` or both"),
        ("interval", {"low": 1.0, "high": 1.0}, "not below"),
        ("psd", {"rank": 5}, r"1\.\.4"),
        ("spd", {"eps": -1.0}, "must not be negative"),
        ("hurwitz_stable", {"decay": -1.0}, "must not be negative"),
        ("poincare_ball", {"curvature": 0.0}, "must be positive"),
        ("lorentz", {"curvature": -1.0}, "must be positive"),
        ("special_orthogonal", {"map": "householder"}, "matrix_exp or cayley"),
        ("grassmann", {"map": "householder"}, "matrix_exp or cayley"),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_is_allowed(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RewriterError, match=message):
        built(name, arguments, torch.ones(4, 4))
