"""The exponential of skew matrices, over all the polynomials it chooses from: a rotation says what it should be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.parametrizations import Orthogonal

ANGLES = [0.0, 1e-30, 1e-5, *(step / 20 for step in range(1, 131))]


def rotation(angle: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the exponential of [[0, -t], [t, 0]], and the derivatives of its first column."""
    X = torch.tensor([[0.0, 0.0], [angle, 0.0]], dtype=dtype, requires_grad=True)
    Q = Orthogonal("matrix_exp", False, weight=X.detach())(X)
    slopes = [torch.autograd.grad(entry, X, retain_graph=True)[0][1, 0] for entry in Q[:, 0]]
    return Q.detach(), torch.stack(slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_angle_is_exact_to_a_few_roundings(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for angle in ANGLES:
        t = torch.tensor(angle, dtype=dtype).double().item()  # the one that it is given
        Q, slopes = rotation(angle, dtype)
        wanted = torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]], dtype=torch.float64)
        rounding = 8 * eps * max(1.0, t)
        assert (Q.double() - wanted).abs().max() <= rounding, angle
        gradient = torch.tensor([-math.sin(t), math.cos(t)], dtype=torch.float64)
        assert (slopes.double() - gradient).abs().max() <= 2 * rounding, angle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gives_the_identity_and_its_derivative(dtype: torch.dtype) -> None:
    Q, slopes = rotation(0.0, dtype)
    assert torch.equal(Q, torch.eye(2, dtype=dtype))
    assert slopes.tolist() == [0.0, 1.0]


class Products(TorchDispatchMode):
    """Counts the products of two square matrices of one size."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.count = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.count += args[-1].shape == args[-2].shape == (self.n, self.n)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "norm", "products"),
    [
        (torch.float32, 0.05, 2),
        (torch.float32, 0.57, 3),
        (torch.float32, 1.4, 4),
        (torch.float32, 2.9, 5),
        (torch.float32, 5.5, 6),
        (torch.float64, 0.04, 3),
        (torch.float64, 0.28, 4),
        (torch.float64, 1.0, 5),
        (torch.float64, 2.0, 6),
    ],
)
def test_products_by_norm(dtype: torch.dtype, norm: float, products: int) -> None:
    torch.manual_seed(0)
    n = 6
    blocks = [torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64) * norm * scale for scale in (1.0, 0.3, 0.1)]
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    X = (basis @ torch.block_diag(*blocks) @ basis.T).to(dtype)
    step = Orthogonal("matrix_exp", False, weight=X)
    with Products(n) as counted:
        Q = step(X)
    assert counted.count == products
    assert torch.allclose(Q.double(), torch.matrix_exp(X.double()), atol=20 * torch.finfo(dtype).eps, rtol=0.0)


@pytest.mark.parametrize("spectrum", ["one pair", "equal", "spread", "zero"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 70])
@pytest.mark.parametrize("norm", [0.04, 1.05, 2.75, 20.0])
def test_every_spectrum_is_within_a_few_roundings(spectrum: str, n: int, norm: float) -> None:
    torch.manual_seed(n)
    count = n // 2
    sizes = {
        "one pair": torch.eye(max(count, 1), dtype=torch.float64)[0] * norm,
        "equal": torch.full((max(count, 1),), norm, dtype=torch.float64),
        "spread": torch.linspace(0, norm, max(count, 1), dtype=torch.float64),
        "zero": torch.zeros(max(count, 1), dtype=torch.float64),
    }[spectrum][:count]
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    A = torch.block_diag(*(size * turn for size in sizes), torch.zeros(n % 2, n % 2, dtype=torch.float64))
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    A = basis @ A @ basis.T
    for X in (A.float(), torch.stack([A.float() / 7, A.float()])):
        Q = Orthogonal("matrix_exp", False, weight=X)(X)
        exact = torch.matrix_exp((X.tril() - X.tril().mT).double())
        assert (Q.double() - exact).abs().max() <= 8 * torch.finfo(torch.float32).eps * max(1.0, norm) * max(
            n, 4
        ) ** 0.5
