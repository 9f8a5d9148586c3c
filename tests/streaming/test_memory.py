"""What streaming holds in memory: the largest site, and not the checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.streaming import CHAINS, RUN, make, make_adapter

MB = 2**20
SITE = 2048 * 2048 * 4


def peak_of(code: str, *arguments: object) -> float:
    """Return the peak memory of a process in MB above an interpreter that has imported torch and rewriter."""
    command = [sys.executable, "-c", RUN, code, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1].strip("[]").split(",")[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux")
def test_the_peak_is_the_largest_site_and_not_the_checkpoint(tmp_path: Path) -> None:
    names = make(tmp_path / "plain", 0.75, 3, 2048, torch.float32)
    make_adapter(tmp_path / "adapter", names, 2048)
    rules = f"reparam: 1\nrules:\n  - {{name: all, select: '**.weight', chain: [{CHAINS['weight_norm']}]}}\n"
    # Inputs, the value and two intermediate results of the largest site, one buffer to write, 300 MB.
    bound = (4 * SITE + SITE) / MB + 300
    runs = [
        ("apply_checkpoint", repr(rules), "plain", "stored"),
        ("bake_checkpoint", repr(rules), "stored", "baked"),
        ("merge_checkpoint", repr([str(tmp_path / "adapter")]), "plain", "merged"),
    ]
    for verb, argument, given, out in runs:
        code = f"streaming.{verb}(sys.argv[2], {argument}, sys.argv[3], workers=2)"
        assert peak_of(code, tmp_path / given, tmp_path / out) < bound < 0.75 * 1024, verb
