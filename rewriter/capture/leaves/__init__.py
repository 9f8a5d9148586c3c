"""torch.nn's modules as functions of their tensors, one family per file; importing this registers them all."""

from __future__ import annotations

from rewriter.capture.leaves import (
    _adaptive_softmax,
    _attention,
    _cells,
    _convolution,
    _embedding,
    _linear,
    _normalization,
    _recurrent,
    _sync_batch_norm,
    _transformer,
)

__all__ = [
    "_adaptive_softmax",
    "_attention",
    "_cells",
    "_convolution",
    "_embedding",
    "_linear",
    "_normalization",
    "_recurrent",
    "_sync_batch_norm",
    "_transformer",
]
