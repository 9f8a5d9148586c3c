from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize, prune

from rewriter.errors import RewriterError
from rewriter.parametrizations._mask import Mask

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@given(shape=shapes, dtype=dtypes)
def test_pruned_entries_are_zero_and_kept_ones_untouched(shape: list[int], dtype: torch.dtype) -> None:
    weight, kept = torch.randn(shape, dtype=dtype), torch.rand(shape) < 0.5
    value = Mask(kept, weight=weight)(weight)
    assert value.dtype == dtype
    assert torch.equal(value, torch.where(kept, weight, 0))


@given(shape=shapes, factors=st.booleans())
def test_equals_custom_from_mask(shape: list[int], factors: bool) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape))
    mask = torch.rand(shape) if factors else (torch.rand(shape) < 0.5).float()
    ours = Mask(mask)(module.weight)
    prune.custom_from_mask(module, "weight", mask)
    assert torch.equal(ours, module.weight)


def test_stays_zero_after_optimizer_steps() -> None:
    layer, kept = nn.Linear(6, 4), torch.rand(4, 6) < 0.5
    parametrize.register_parametrization(layer, "weight", Mask(kept))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
    assert (layer.weight[~kept] == 0).all()
    assert (layer.weight[kept] != 0).all()


def test_right_inverse_keeps_the_pruned_entries() -> None:
    weight, mask = torch.randn(3, 3), Mask(torch.eye(3))
    assert torch.equal(mask.right_inverse(weight), weight)
    value = mask(weight)
    assert torch.equal(mask(mask.right_inverse(value)), value)


@given(shape=shapes, factors=st.booleans())
def test_two_masks_are_one(shape: list[int], factors: bool) -> None:
    first = Mask(torch.rand(shape) < 0.5)
    second = Mask(torch.rand(shape) if factors else torch.rand(shape) < 0.5)
    merged = first.fuse(second)
    X = torch.randn(shape)
    assert merged is not None
    torch.testing.assert_close(merged(X), second(first(X)), rtol=0, atol=0)
    assert first.fuse(nn.Identity()) is None


def test_a_row_mask_broadcasts() -> None:
    rows = torch.tensor([[True], [False]])
    value = Mask(rows, weight=torch.ones(2, 3))(torch.ones(2, 3))
    assert value.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(RewriterError, match=r"\[2, 2\] does not fit a weight of shape \[3, 2\]"):
        Mask(torch.ones(2, 2), weight=torch.ones(3, 2))


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npy"])
def test_reads_a_mask_from_a_file(tmp_path, suffix: str) -> None:
    kept = torch.rand(3, 4) < 0.5
    path = tmp_path / f"mask.{suffix}"
    if suffix == "pt":
        torch.save(kept, path)
    elif suffix == "safetensors":
        save_file({"only": kept}, path)
    else:
        numpy.save(path, kept.numpy())
    assert torch.equal(Mask(file=str(path)).mask, kept)


def test_a_file_of_several_masks_is_read_by_key_or_by_the_names_of_the_sites(tmp_path) -> None:
    path = str(tmp_path / "masks.safetensors")
    stored = {"a.weight": torch.ones(2), "b.weight_mask": torch.zeros(2)}
    save_file(stored, path)
    assert Mask(file=path, key="b.weight_mask").mask.tolist() == [False, False]
    plan = Mask.plan_sites([torch.ones(2)] * 2, ["b.weight", "a.weight"], file=path)
    assert [site["chosen_mask"].tolist() for site in plan] == [[False, False], [True, True]]
    with pytest.raises(RewriterError, match="choose one with `key`"):
        Mask.plan_sites([torch.ones(2)], ["c.weight"], file=path)
    with pytest.raises(RewriterError, match="choose one with `key`"):
        Mask(file=path)
    with pytest.raises(RewriterError, match=r"did you mean 'a\.weight'"):
        Mask(file=path, key="a.weigth")


def test_what_is_no_mask_file_is_refused(tmp_path) -> None:
    (tmp_path / "mask.txt").write_text("")
    torch.save(3, tmp_path / "mask.pt")
    for name, message in {"none.pt": "no mask file", "mask.txt": "ends in", "mask.pt": "contains an int"}.items():
        with pytest.raises(RewriterError, match=message):
            Mask(file=str(tmp_path / name))
    with pytest.raises(RewriterError, match="give one"):
        Mask()


def test_forward_scripts_and_exports() -> None:
    mask, X = Mask(torch.rand(3, 4) < 0.5), torch.randn(3, 4)
    assert torch.equal(torch.jit.script(mask)(X), mask(X))
    assert torch.equal(torch.export.export(mask, (X,)).module()(X), mask(X))
