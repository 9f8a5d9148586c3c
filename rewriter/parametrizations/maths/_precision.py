"""Precision: weights are computed in at least float32, whatever autocast says, and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def widen(X: Tensor) -> Tensor:
    """Return X in float32 where it is float16 or bfloat16, else X itself."""
    if X.dtype == torch.float16 or X.dtype == torch.bfloat16:
        return X.float()
    return X


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that :func:`widen` gives."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class WideBuffers(nn.Module):
    """A module whose buffers stay as precise as what is computed from them, however the model is converted.

    ``model.half()`` would round a base point off its manifold, and ``model.float()`` not bring it back.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WideBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != wide_dtype(now.dtype):
                self._buffers[name] = buffer.to(now.device, wide_dtype(now.dtype))
        return self


class Precise(WideBuffers):
    """A parametrization with one input whose `value` is computed in full precision and rounded once.

    Inside autocast a matrix product would round to half precision, and an orthogonal matrix would not be one.
    """

    def forward(self, X: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.value(widen(X)).to(X.dtype)
        else:
            if X.is_meta or not torch.is_autocast_enabled(X.device.type):
                return self.value(widen(X)).to(X.dtype)
            with torch.autocast(X.device.type, enabled=False):
                return self.value(widen(X)).to(X.dtype)

    def value(self, X: Tensor) -> Tensor:
        """Return the value for X, both at least float32."""
        raise NotImplementedError
