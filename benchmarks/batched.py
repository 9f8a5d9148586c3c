"""Many small layers: their equal chains evaluated in one call, against one after the other."""

from __future__ import annotations

import itertools

import torch
from torch import nn

import rewriter
from benchmarks._measure import interleaved
from benchmarks._models import ORTHOGONAL, by_torch, spec_of, training_step
from benchmarks._report import Group
from benchmarks._settings import Settings

LOOP = {"householder": 3.0}


def measure(settings: Settings) -> Group:
    """Time a training step of 48 small layers."""
    layers, width, batch = (6, 8, 4) if settings.quick else (48, 16, 32)
    group = Group(
        f"{layers} layers of {width}×{width}, one training step",
        f"Linear layers with tanh between them, batch {batch}. *batched* evaluates all weights in one call, *loop* is "
        "the same model rewritten without the batch pass.",
    )
    torch.manual_seed(0)
    pairs = [(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)]
    plain = nn.Sequential(*itertools.chain(*pairs)).to(settings.device)
    x = torch.randn(batch, width, device=settings.device)
    names = [f"{2 * index}.weight" for index in range(layers)]
    for name in ORTHOGONAL:
        spec = spec_of(name)
        contenders = {
            "plain": training_step(plain, x),
            "batched": training_step(rewriter.rewrite(plain, spec), x),
            "loop": training_step(rewriter.rewrite(plain, spec, without=["batch"]), x),
            "torch uncached": training_step(by_torch(plain, name, names), x),
        }
        timings = interleaved(contenders, settings.rounds(30), device=settings.device)
        group.add_times(name, timings)
        asked = settings.asked(LOOP[name]) if name in LOOP else None
        group.faster(name, timings, "batched", "loop", asked)
        group.faster(name, timings, "batched", "torch uncached", None)
    return group
