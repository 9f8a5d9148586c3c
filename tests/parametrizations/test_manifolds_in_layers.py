"""What geotorch's own tests ask of each manifold, in layers: draw, assign, train, assign again, refuse.

Membership is asked of the value itself, not of `on_space`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import rewrite
from rewriter.parametrizations._registry import construct, find
from rewriter.state import get_value, set_value


def near(found: Tensor, wanted: Tensor | float) -> bool:
    wanted = torch.as_tensor(wanted, dtype=found.dtype).expand_as(found)
    return torch.allclose(found, wanted, atol=1e3 * torch.finfo(found.dtype).eps)


def isometry(W: Tensor) -> bool:
    W = W.mT if W.size(-2) < W.size(-1) else W
    return near(W.mT @ W, torch.eye(W.size(-1), dtype=W.dtype))


def of_rank(r: int, *, exactly: bool) -> Callable[[Tensor], bool]:
    def holds(W: Tensor) -> bool:
        rank = torch.linalg.matrix_rank(W, rtol=1e3 * torch.finfo(W.dtype).eps)
        return bool((rank == r if exactly else rank <= r).all())

    return holds


def definite(least: float) -> Callable[[Tensor], bool]:
    return lambda W: torch.equal(W, W.mT) and bool((torch.linalg.eigvalsh(W) > least * W.abs().max()).all())


def semidefinite_of_rank(r: int, *, exactly: bool) -> Callable[[Tensor], bool]:
    rank, positive = of_rank(r, exactly=exactly), definite(-1e-5)
    return lambda W: rank(W) and positive(W)


def within(radius: float) -> Callable[[Tensor], bool]:
    return lambda W: bool(((torch.linalg.svdvals(W) - 1).abs() < radius + 1e-5).all())


SQUARE: list[tuple[str, dict[str, Any], Callable[[Tensor], bool]]] = [
    ("special_orthogonal", {}, lambda W: isometry(W) and near(torch.linalg.det(W), 1.0)),
    ("special_orthogonal", {"map": "cayley"}, lambda W: isometry(W) and near(torch.linalg.det(W), 1.0)),
    ("symmetric", {}, lambda W: torch.equal(W, W.mT)),
    ("symmetric", {"lower": True}, lambda W: torch.equal(W, W.mT)),
    ("skew", {}, lambda W: torch.equal(W, -W.mT)),
    ("skew", {"lower": True}, lambda W: torch.equal(W, -W.mT)),
    ("spd", {}, definite(0.0)),
    ("psd", {}, definite(-1e-5)),
    *(("psd", {"rank": r}, semidefinite_of_rank(r, exactly=False)) for r in (1, 3)),
    *(("psd", {"rank": r, "fixed": True}, semidefinite_of_rank(r, exactly=True)) for r in (1, 3)),
    ("gl_plus", {}, lambda W: bool((torch.linalg.det(W) > 0).all())),
    ("sl", {}, lambda W: torch.allclose(torch.linalg.det(W), W.new_ones(()), atol=1e-3)),
]
ANY: list[tuple[str, dict[str, Any], Callable[[Tensor], bool]]] = [
    *(("orthogonal", {"map": m}, isometry) for m in ("matrix_exp", "cayley", "householder")),
    *(("stiefel", {"map": m}, isometry) for m in ("matrix_exp", "cayley")),
    ("grassmann", {}, isometry),
    *(("low_rank", {"rank": r}, of_rank(r, exactly=False)) for r in (1, 3)),
    *(("fixed_rank", {"rank": r}, of_rank(r, exactly=True)) for r in (1, 3)),
    *(
        ("almost_orthogonal", {"radius": radius, "f": f}, within(radius))
        for radius, f in ((0.01, "sin"), (0.5, "tanh"), (1.0, "sin"), (1.0, "tanh"))
    ),
    *(("sphere", {"radius": r}, lambda W, r=r: near(W.norm(dim=-1) / r, 1.0)) for r in (0.01, 10.0)),
]
MANIFOLDS = [*SQUARE, *ANY]


class Stack(nn.Module):
    """A parameter that is a stack of matrices, such as the experts of a mixture."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int | str] | None, tuple[int, int]]] = {
    # name → the layer, the shape of its input, how the chain sees the tensor, and the shape of each matrix
    "1x1": (lambda: nn.Linear(1, 1), (3, 1), None, (1, 1)),
    "4x4": (lambda: nn.Linear(4, 4), (3, 4), None, (4, 4)),
    "tall": (lambda: nn.Linear(3, 7), (3, 3), None, (7, 3)),
    "column": (lambda: nn.Linear(1, 5), (3, 1), None, (5, 1)),
    "wide": (lambda: nn.Linear(7, 3), (3, 7), None, (3, 7)),
    "stack": (lambda: Stack(2, 4, 4), (2, 3, 4), None, (4, 4)),
    "tall stack": (lambda: Stack(2, 5, 3), (2, 3, 5), None, (5, 3)),
    "kernel": (lambda: nn.Conv2d(2, 4, 3), (2, 2, 5, 5), ["out", -1], (4, 18)),
    "slices": (lambda: nn.Conv2d(2, 3, 3), (2, 2, 5, 5), [-1, 3, 3], (3, 3)),
}
CASES = [
    (*manifold, layer)
    for manifold in MANIFOLDS
    for layer, (*_, (m, n)) in LAYERS.items()
    # Ranks above a side and matrices that are not square are refused below; square ones have no Grassmannian.
    if manifold[1].get("rank", 1) <= min(m, n)
    and (m == n or manifold not in SQUARE)
    and (m != n or manifold[0] != "grassmann")
]


def title(case: Any) -> str | None:
    return "-".join(map(str, case.values())) if isinstance(case, dict) else case if isinstance(case, str) else ""


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("name", "arguments", "holds", "layer"), CASES, ids=title)
def test_a_layer_is_drawn_trained_and_assigned_on_its_manifold(
    name: str, arguments: dict[str, Any], holds: Callable[[Tensor], bool], layer: str, dtype: torch.dtype
) -> None:
    make, inputs, view, matrix = LAYERS[layer]
    model = nn.Sequential(make()).to(dtype)
    rule = {"name": "r", "select": "0.weight", "chain": [{name: arguments}], "init": "sample"}
    spec = {"reparam": 1, "rules": [rule if view is None else {**rule, "reshape": view}]}
    new = rewrite(model, spec, capture="module")

    def value() -> Tensor:
        found = get_value(new, "0.weight")
        assert found.shape == model[0].weight.shape and found.dtype == dtype
        return found if view is None else found.reshape(-1, *matrix)

    drawn = value()
    assert holds(drawn)
    # GL⁺ and SL have values of any condition; assigning one rounds it by that.
    slack = float(torch.linalg.cond(drawn).max()) if name in ("gl_plus", "sl") else 1.0
    tolerance = 1e3 * torch.finfo(dtype).eps * max(1.0, slack)
    optimizer = torch.optim.SGD(new.parameters(), lr=1e-3)
    x = torch.randn(inputs, dtype=dtype)
    for _ in range(3):
        optimizer.zero_grad()
        F.silu(new(x)).mean().backward()
        assert any(p.grad is not None and p.grad.isfinite().all() for p in new[0].parametrizations.parameters())
        optimizer.step()
        assert holds(value())
    trained = get_value(new, "0.weight")
    for wanted in (trained, drawn.reshape(trained.shape)):  # a base point moves to the value: the value stays
        set_value(new, "0.weight", wanted)
        torch.testing.assert_close(get_value(new, "0.weight"), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "message"),
    [
        *((name, {"rank": r}, (4, 3), "1..3") for name in ("low_rank", "fixed_rank") for r in (0, 4, 5)),
        *(("psd", {"rank": r, "fixed": f}, (4, 4), "1..4") for r in (0, 5) for f in (True, False)),
        *(("almost_orthogonal", {"radius": radius}, (5, 4), "radius") for radius in (2.0, -1.0)),
        ("almost_orthogonal", {"radius": 0.5, "f": "fail"}, (5, 4), "f must be"),
        ("sphere", {"radius": -1.0}, (5,), "radius"),
        *((name, {"map": "wrong"}, (3, 3), "map must be") for name in ("orthogonal", "special_orthogonal", "stiefel")),
    ],
)
def test_ranks_radii_and_maps_that_do_not_exist_are_refused(
    name: str, arguments: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        construct(find(name), torch.randn(shape), arguments)
