"""Several sites at a time: right inverses too, with draws and threads that do not depend on it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewriter import rewrite
from rewriter.parametrizations import _registry
from rewriter.streaming import apply_checkpoint, bake_checkpoint
from rewriter.streaming._layout import Output, Shard, Work
from rewriter.streaming._write import AT_ONCE, Writer
from tests.streaming.conftest import spec, write_folder

MEETING = threading.Barrier(2, timeout=20)


class Meets(nn.Module):
    """Its right inverse ends only if that of another site runs at the same time."""

    def forward(self, X: Tensor) -> Tensor:
        return X + 1

    def right_inverse(self, value: Tensor) -> Tensor:
        if not value.is_meta:
            MEETING.wait()
        return value - 1


@pytest.fixture
def meets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registry._registered, "meets", Meets)


@pytest.mark.usefixtures("meets")
def test_right_inverses_of_two_sites_run_at_the_same_time(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(4, 4), "b.weight": torch.zeros(4, 4)}, tmp_path / "in.safetensors")
    apply_checkpoint(tmp_path / "in.safetensors", spec("meets"), tmp_path / "out.safetensors", workers=2)
    assert all(torch.equal(one, -torch.ones(4, 4)) for one in load_file(tmp_path / "out.safetensors").values())


def test_draws_do_not_depend_on_how_many_sites_run_at_the_same_time(tmp_path: Path) -> None:
    save_file({f"{n}.weight": torch.randn(6, 6) for n in range(8)}, tmp_path / "in.safetensors")
    before = torch.get_rng_state()
    rules = spec({"lora": {"r": 2, "init_lora_weights": False}}, {"shira": {"r": 1}})
    found = []
    for workers in (1, 4, 4):
        apply_checkpoint(tmp_path / "in.safetensors", rules, tmp_path / "out.safetensors", workers=workers, force=True)
        found.append((tmp_path / "out.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]
    assert torch.equal(torch.get_rng_state(), before)
    drawn = [tensor for name, tensor in load_file(tmp_path / "out.safetensors").items() if name.endswith("lora_A")]
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == 8


def work(nbytes: int, seen: list[int]) -> Work:
    def run() -> list[list[Tensor]]:
        seen.append(torch.get_num_threads())
        return [[torch.zeros(2)]]

    return Work("a", [], [], [Output("a", torch.float32, (2,))], run, nbytes=nbytes)


@pytest.mark.parametrize(("nbytes", "threads"), [(100, 1), (AT_ONCE, 2), (AT_ONCE + 1, 4)])
def test_sites_that_run_at_the_same_time_share_the_threads(nbytes: int, threads: int, tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        one = work(nbytes, seen)
        Writer([Shard("a", [*one.outputs], [one])], 4, lambda count, total: None).write(
            Shard("a", [*one.outputs], [one]), tmp_path / "a"
        )
        assert (seen, torch.get_num_threads()) == ([threads], 4)
    finally:
        torch.set_num_threads(before)


def test_a_resumed_run_has_the_number_of_threads_of_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shards = [{f"{n}.weight": torch.randn(4, 4)} for n in range(2)]
    write_folder(tmp_path / "in", shards)
    seen: list[int] = []
    write = Writer.write

    def ends(self: Any, shard: Shard, path: Path) -> dict[str, int]:
        seen.append(self.threads)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return write(self, shard, path)

    monkeypatch.setattr(Writer, "write", ends)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(KeyboardInterrupt):
            bake_checkpoint(tmp_path / "in", spec("symmetric"), tmp_path / "out", workers=1)
        torch.set_num_threads(1)
        bake_checkpoint(tmp_path / "in", spec("symmetric"), tmp_path / "out", workers=1, resume=True)
    finally:
        torch.set_num_threads(before)
    assert seen == [3, 3, 3]


@pytest.mark.parametrize("capture", ["graph", "module"])
def test_shards_loaded_into_a_meta_model_warn_once(capture: Any) -> None:
    rules = spec("symmetric", select="*.weight")
    stored = rewrite(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), rules, capture=capture).state_dict()
    with torch.device("meta"):
        model = rewrite(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), rules, capture=capture)
    with pytest.warns(UserWarning, match="no value") as warned:
        for key, tensor in stored.items():
            model.load_state_dict({key: tensor}, strict=False, assign=True)
    assert len(warned) == 1
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
