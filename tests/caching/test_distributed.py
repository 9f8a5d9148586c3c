"""`evaluate_once` under DistributedDataParallel: two processes on this machine."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rewriter import RewriterError, evaluate_once, rewrite

SPEC = {"reparam": 1, "rules": [{"name": "q", "select": "0.weight", "chain": [{"orthogonal": {"map": "cayley"}}]}]}
X = torch.linspace(-1, 1, 4 * 2 * 3 * 4, dtype=torch.float64).reshape(4, 2, 3, 4)
"""Four micro-batches for each of two processes."""

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux", reason="forks, and needs gloo"
)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return rewrite(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double(), SPEC)


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def _train(rank: int, port: int, results: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no look-up of this machine's name
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model = _model()
        parallel = DistributedDataParallel(model)
        found: list[Any] = []
        for _ in range(2):  # the second time the reducer has rebuilt its buckets
            model.zero_grad()
            with evaluate_once(parallel):
                with parallel.no_sync():
                    for micro in X[:3, rank]:
                        parallel(micro).square().mean().backward()
                parallel(X[3, rank]).square().mean().backward()
            found.append(_gradients(model))
        model.zero_grad()
        with evaluate_once(parallel):
            parallel(X[0, rank]).square().mean().backward()
        single = _gradients(model)
        try:
            evaluate_once(DistributedDataParallel(model, find_unused_parameters=True)).__enter__()
            refused = ""
        except RewriterError as problem:
            refused = str(problem)
        torch.save({"found": found, "single": single, "refused": refused}, f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_gradients_are_reduced_at_the_end_of_the_block(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork has torch imported already; nothing here uses what does not survive one (threads, an accelerator).
    context = mp.start_processes(_train, (port, str(tmp_path)), nprocs=2, join=False, start_method="fork")
    while not context.join(timeout=60):
        pass

    def expected(batches: torch.Tensor) -> list[torch.Tensor]:
        model = _model()
        for micro in batches.flatten(0, 1):
            (model(micro).square().mean() / 2).backward()
        return _gradients(model)

    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        for found in result["found"]:
            torch.testing.assert_close(found, expected(X), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(result["single"], expected(X[:1]), rtol=1e-6, atol=1e-12)
        assert "find_unused_parameters" in result["refused"]
