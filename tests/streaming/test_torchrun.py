"""Several processes write one output."""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.streaming.conftest import write_folder

SPEC = "reparam: 1\nrules:\n  - {name: even, select: '*.weight', chain: [CHAIN]}\n"
RUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rewriter")


@pytest.mark.slow
def test_processes_of_torchrun_write_the_bytes_that_one_process_writes(tmp_path: Path) -> None:
    shards = [{f"{number}.weight": torch.randn(8, 8), f"{number}.bias": torch.randn(8)} for number in range(5)]
    shards[3]["3.weight"][0, 0] = torch.nan
    write_folder(tmp_path / "bad", shards, config_json="{}")
    shards[3]["3.weight"][0, 0] = 0
    write_folder(tmp_path / "in", shards, config_json="{}")
    (tmp_path / "spec.yaml").write_text(SPEC.replace("CHAIN", "symmetric"))

    def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, check=check, capture_output=True, text=True)

    done = run(*RUN, "bake", "in", "--spec", "spec.yaml", "-o", "two", "--json")
    assert done.stdout.count('"baked"') == 1
    run(sys.executable, "-m", "rewriter", "bake", "in", "--spec", "spec.yaml", "-o", "one")
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == sorted(os.listdir(tmp_path / "in"))
    for file in (tmp_path / "one").iterdir():
        assert filecmp.cmp(tmp_path / "two" / file.name, file, shallow=False)
    failed = run(*RUN, "bake", "bad", "--spec", "spec.yaml", "-o", "three", check=False)
    assert failed.returncode != 0
    assert "3.weight has 1 of 64 entries that are NaN" in failed.stderr
    assert not (tmp_path / "three").exists()
