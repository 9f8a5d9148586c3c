"""`evaluate_once` under DistributedDataParallel: one and two processes on this machine."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rewriter import RewriterError, evaluate_once, rewrite
from tests.processes import joined, run_processes, work

RULE = {"name": "q", "select": "0.weight", "chain": [{"orthogonal": {"map": "cayley"}}]}
X = torch.linspace(-1, 1, 4 * 2 * 3 * 4, dtype=torch.float64).reshape(4, 2, 3, 4)
"""Four micro-batches for each of two processes."""

GLOO = dist.is_available() and dist.is_gloo_available() and sys.platform == "linux"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not GLOO, reason="needs gloo")]


def _model(capture: str = "auto", cache: str = "forward") -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return rewrite(plain, {"reparam": 1, "rules": [{**RULE, "cache": cache}]}, capture=capture)


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def _train(rank: int, results: str) -> None:
    with joined(rank, results, 2):
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


def _train_alone(rank: int, results: str) -> None:
    with joined(rank, results, 1):
        found: dict[str, Any] = {}
        for capture in ("graph", "module"):
            for cache in ("forward", "version"):
                for view in (False, True):
                    model = _model(capture, cache)
                    parallel = DistributedDataParallel(model, gradient_as_bucket_view=view)
                    calls: list[int] = []
                    stored = next(p for n, p in model.named_parameters() if n.endswith("original"))
                    stored.register_post_accumulate_grad_hook(lambda parameter, calls=calls: calls.append(1))
                    gradients = []
                    for synced in ("last", "none", "single"):
                        model.zero_grad()
                        with evaluate_once(parallel):
                            if synced == "single":
                                parallel(X[0, 0]).square().mean().backward()
                            else:
                                with parallel.no_sync():
                                    for micro in X[:3, 0]:
                                        parallel(micro).square().mean().backward()
                                    if synced == "none":
                                        parallel(X[3, 0]).square().mean().backward()
                                if synced == "last":
                                    parallel(X[3, 0]).square().mean().backward()
                        gradients.append([gradient.clone() for gradient in _gradients(model)])
                    found[f"{capture} {cache} {view}"] = {"gradients": gradients, "calls": len(calls)}
        torch.save(found, f"{results}/{rank}.pt")


def test_one_process_with_and_without_no_sync(tmp_path: Path) -> None:
    run_processes(_train_alone, tmp_path, 1)
    found = torch.load(tmp_path / "0.pt")
    assert len(found) == 8
    for name, result in found.items():
        assert result["calls"] == 3, name
        for gradients, batches in zip(result["gradients"], (X[:, 0], X[:, 0], X[:1, 0]), strict=True):
            model = _model()
            for micro in batches:
                model(micro).square().mean().backward()
            torch.testing.assert_close(gradients, _gradients(model), rtol=1e-6, atol=1e-12, msg=name)


def _train_otherwise(rank: int, results: str) -> None:
    with joined(rank, results, 2):
        found: dict[str, Any] = {}
        for capture in ("graph", "module"):
            model = _model(capture, "version")
            parallel = DistributedDataParallel(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(3):  # an ordinary step, one in a block, and one after exceptions in blocks
                optimizer.zero_grad()
                for synced in (False, True) if step == 2 else ():
                    sync = contextlib.nullcontext() if synced else parallel.no_sync()
                    with contextlib.suppress(KeyError), evaluate_once(parallel), sync:
                        parallel(X[0, rank]).square().mean().backward()
                        raise KeyError
                    optimizer.zero_grad()
                if step == 1:
                    with evaluate_once(parallel):
                        parallel(X[step, rank]).square().mean().backward()
                else:
                    parallel(X[step, rank]).square().mean().backward()
                optimizer.step()
            found[capture] = list(model.parameters())
        torch.save(found, f"{results}/{rank}.pt")


def test_steps_in_blocks_and_out_of_them_take_turns(tmp_path: Path) -> None:
    run_processes(_train_otherwise, tmp_path, 2)
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for micro in X[step]:
            (model(micro).square().mean() / 2).backward()
        optimizer.step()
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt").values():
            torch.testing.assert_close(found, list(model.parameters()), rtol=1e-6, atol=1e-12)


def test_gradients_are_reduced_at_the_end_of_the_block(tmp_path: Path) -> None:
    run_processes(_train, tmp_path, 2)

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


if __name__ == "__main__":
    work(globals())
