"""Several processes write one output."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.streaming.conftest import write_folder

SPEC = "reparam: 1\nrules:\n  - {name: even, select: '*.weight', chain: [CHAIN]}\n"
RUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rewriter")


DYING = """
import os
from pathlib import Path
from torch import nn

class Dies(nn.Module):
    def forward(self, X):
        if not X.is_meta and X[0, 0] == 7 and not Path("died").exists():
            Path("died").touch()
            os._exit(9)
        return (X + X.mT) / 2

    def right_inverse(self, X):
        return X
"""


def run(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, check=check, capture_output=True, text=True)


def assert_same_files(one: Path, other: Path) -> None:
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))
    for file in one.iterdir():
        assert filecmp.cmp(other / file.name, file, shallow=False)


@pytest.fixture
def shards() -> list[dict[str, torch.Tensor]]:
    return [{f"{number}.weight": torch.randn(8, 8), f"{number}.bias": torch.randn(8)} for number in range(5)]


@pytest.mark.slow
def test_processes_of_torchrun_write_the_bytes_that_one_process_writes(
    tmp_path: Path, shards: list[dict[str, torch.Tensor]]
) -> None:
    shards[3]["3.weight"][0, 0] = torch.nan
    write_folder(tmp_path / "bad", shards, config_json="{}")
    shards[3]["3.weight"][0, 0] = 0
    write_folder(tmp_path / "in", shards, config_json="{}")
    (tmp_path / "spec.yaml").write_text(SPEC.replace("CHAIN", "symmetric"))
    done = run(tmp_path, *RUN, "bake", "in", "--spec", "spec.yaml", "-o", "two", "--json")
    assert done.stdout.count('"baked"') == 1
    run(tmp_path, sys.executable, "-m", "rewriter", "bake", "in", "--spec", "spec.yaml", "-o", "one")
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "in"))
    assert_same_files(tmp_path / "one", tmp_path / "two")
    failed = run(tmp_path, *RUN, "bake", "bad", "--spec", "spec.yaml", "-o", "three", check=False)
    assert failed.returncode != 0
    assert "3.weight has 1 of 64 entries that are NaN" in failed.stderr
    assert not (tmp_path / "three").exists()


@pytest.mark.slow
def test_processes_of_torchrun_go_on_after_one_was_killed(
    tmp_path: Path, shards: list[dict[str, torch.Tensor]]
) -> None:
    shards[3]["3.weight"][0, 0] = 7
    write_folder(tmp_path / "in", shards, config_json="{}")
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "spec.yaml").write_text(
        SPEC.replace("rules:", "imports: {my: dying}\nrules:").replace("CHAIN", "my.Dies")
    )
    command = ("bake", "in", "--spec", "spec.yaml", "--allow-import", "dying", "--json", "-o")
    assert run(tmp_path, *RUN, *command, "two", check=False).returncode != 0
    assert (tmp_path / "died").exists() and not (tmp_path / "two").exists()
    resumed = run(tmp_path, *RUN, *command, "two", "--resume")
    # The second process had written its first shard when it died at its second one.
    assert "model-00002-of-00005.safetensors" in json.loads(resumed.stdout)["kept"]
    run(tmp_path, sys.executable, "-m", "rewriter", *command, "one")
    assert_same_files(tmp_path / "one", tmp_path / "two")
