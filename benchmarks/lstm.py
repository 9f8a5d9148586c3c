"""nn.LSTM with all its weights parametrized: one fused call that reads each of them."""

from __future__ import annotations

import torch

import rewriter
from benchmarks._measure import interleaved
from benchmarks._models import Fused, by_torch, spec_of, training_step, under_cached
from benchmarks._report import Group
from benchmarks._settings import Settings

ROUNDS = {"weight_norm": 400, "spectral_norm": 200, "householder": 60}
"""Parametrization → rounds. Contenders of almost the same time need more rounds."""
TENSORS = [f"lstm.weight_{kind}_l{layer}" for layer in range(2) for kind in ("ih", "hh")]
CACHED = 1.0


def measure(settings: Settings) -> Group:
    """Time a training step of a two-layer LSTM."""
    steps, width, batch = (4, 8, 2) if settings.quick else (50, 128, 32)
    group = Group(
        "nn.LSTM with 4 parametrized weights, one training step",
        f"Two layers of {width} units, {steps} time steps, batch {batch}; all four weight matrices are parametrized.",
    )
    torch.manual_seed(0)
    plain = Fused(width).to(settings.device)
    x = torch.randn(steps, batch, width, device=settings.device)
    for name, rounds in ROUNDS.items():
        spec = spec_of(name, "lstm.weight_*")
        parametrized = training_step(by_torch(plain, name, TENSORS), x)
        contenders = {
            "plain": training_step(plain, x),
            "graph": training_step(rewriter.rewrite(plain, spec, capture="graph"), x),
            "module": training_step(rewriter.rewrite(plain, spec, capture="module"), x),
            "torch cached": under_cached(parametrized),
            "torch uncached": parametrized,
        }
        timings = interleaved(contenders, settings.rounds(rounds), device=settings.device)
        group.add_times(name, timings)
        for ours in ("graph", "module"):
            group.faster(name, timings, ours, "torch cached", settings.asked(CACHED))
            group.faster(name, timings, ours, "torch uncached", None)
            group.costs(name, timings, ours, "plain", None)
    return group
