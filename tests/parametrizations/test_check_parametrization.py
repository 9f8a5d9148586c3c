from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.testing import LAWS, LawError, check_parametrization


class Double(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return 2 * X

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / 2


class WrongInverse(Double):
    def right_inverse(self, value: Tensor) -> Tensor:
        return value


class Counting(Double):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.count: Tensor

    def forward(self, X: Tensor) -> Tensor:
        self.count += 1
        return 2 * X


class Random(Double):
    def forward(self, X: Tensor) -> Tensor:
        return X + torch.rand_like(X)


class Rounding(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.float()


class Transposing(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.mT


class Normalizing(nn.Module):
    batched = True

    def forward(self, X: Tensor) -> Tensor:
        return X / X.norm()


class Detaching(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.detach() * X


class Leaving(nn.Module):
    """Has a tensor that no conversion finds."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.base = torch.eye(weight.size(0), dtype=weight.dtype)

    def forward(self, X: Tensor) -> Tensor:
        return self.base @ X


class Unscriptable(nn.Module):
    def forward(self, X, **others):  # type: ignore[no-untyped-def]
        return X


@pytest.mark.parametrize(
    ("subject", "law"),
    [
        (WrongInverse, "right inverse"),
        (Counting, "state"),
        (Random, "determinism"),
        (Rounding, "dtype"),
        (Transposing, "shape"),
        (Normalizing, "batching"),
        (Normalizing, "hard points"),
        (Detaching, "gradient"),
        (Leaving, "conversion"),
        (Unscriptable, "scripting"),
    ],
)
def test_a_violated_law_is_reported_by_name(subject: type[nn.Module], law: str) -> None:
    with pytest.raises(LawError) as raised:
        check_parametrization(subject, (3, 2))
    assert law in raised.value.report.violated
    assert f"  {law}" in str(raised.value)
    assert isinstance(raised.value, RewriterError) and isinstance(raised.value, AssertionError)


def test_a_law_can_be_skipped_by_name_only() -> None:
    skipped = ["gradient", "second gradient"]
    assert check_parametrization(Detaching, (3, 2), skip=skipped).results["gradient"].endswith("skipped")
    with pytest.raises(ValueError, match="no law is called"):
        check_parametrization(Double, (3, 2), skip=["gradients"])


def test_a_report_says_what_came_out_of_every_law() -> None:
    report = check_parametrization(Double(), (3, 2))
    assert list(report.results) == list(LAWS)
    assert not report.violated
    assert report.results["sample"] == "does not apply: it has no sample()"
    assert report.results["batching"].startswith("does not apply")


def test_a_module_without_a_right_inverse_is_checked_for_the_rest() -> None:
    assert check_parametrization(nn.Softplus(), (3,)).results["right inverse"].startswith("does not apply")


def test_the_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    check_parametrization("orthogonal", (3, 3))
    assert torch.equal(torch.get_rng_state(), before)
