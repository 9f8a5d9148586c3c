"""Everything that this folder takes from torch and that torch does not document.

`tests/capture/test_wrong_recordings.py` notices when one of these changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import _VF
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils import _pytree as pytree

__all__ = ["_VF", "HigherOrderOperator", "OpOverload", "ambient_state", "pytree", "set_grad_enabled", "without_modes"]

set_grad_enabled: Any = torch._C._set_grad_enabled
"""What `torch.no_grad` and its relatives call; a TorchFunctionMode sees the call."""

without_modes: Any = torch._C.DisableTorchFunction
"""A context in which no TorchFunctionMode sees anything."""

_DEVICES = ("cpu", "cuda")


def ambient_state() -> tuple[Any, ...]:
    """Return the modes of this thread that change what an operation does, and that a graph does not show."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_any_autocast_enabled() and [torch.get_autocast_dtype(device) for device in _DEVICES],
        torch.get_default_dtype(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_dispatch_stack(),
    )


def function_modes() -> int:
    """Return how many TorchFunctionModes this thread has entered; a default device is one."""
    return torch._C._len_torch_function_stack()
