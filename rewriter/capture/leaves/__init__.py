"""torch.nn's modules as functions of their tensors, one family per file; importing this registers them all."""

from __future__ import annotations

from rewriter.capture.leaves import (
    _attention,
    _cells,
    _convolution,
    _embedding,
    _linear,
    _normalization,
    _recurrent,
)

__all__ = ["_attention", "_cells", "_convolution", "_embedding", "_linear", "_normalization", "_recurrent"]
