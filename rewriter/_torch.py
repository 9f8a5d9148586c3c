"""All that this package takes from torch under a private name, with the reason for each.

`tests/test_private_names.py` lists these names, so that a torch without one of them fails in one place. It also checks
that no other file takes a private name from torch. What changes its meaning is noticed by the tests named here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _VF
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph import _PyTreeInfo as PyTreeInfo
from torch.nn.modules.module import _WrappedHook as WrappedHook
from torch.nn.utils.parametrizations import _OrthMaps as OrthogonalMaps
from torch.nn.utils.parametrizations import _Orthogonal as TorchOrthogonal
from torch.nn.utils.parametrizations import _SpectralNorm as TorchSpectralNorm
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "_VF",
    "FakeTensor",
    "FunctionalTensor",
    "HigherOrderOperator",
    "LazyGraphModule",
    "OpOverload",
    "OpOverloadPacket",
    "OrthogonalMaps",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "TorchDispatchMode",
    "TorchOrthogonal",
    "TorchSpectralNorm",
    "TorchWeightNorm",
    "WrappedHook",
    "ambient_state",
    "autocast_on",
    "composable_keys",
    "current_backward",
    "detect_fake_mode",
    "dispatch_modes",
    "foreach_copy",
    "foreach_divide",
    "foreach_norm",
    "foreach_over",
    "foreach_times",
    "forward_ad",
    "function_modes",
    "functorch_interpreter",
    "inductor",
    "is_functorch_tensor",
    "is_fx_symbolic_tracing",
    "nn_functions",
    "operator_names",
    "pytree",
    "saved_tensor_hooks",
    "set_grad_enabled",
    "tensor_functions",
    "tracing_state",
    "weight_norm_backward",
    "weight_norm_with_norm",
    "when_backward_ends",
    "will_execute",
    "without_modes",
    "without_subclasses",
]

# Modes that change what an operation does. Each is asked at every forward, where finding the name takes longer than
# the call: import these functions by name. tests/caching notices when one answers otherwise.
dispatch_modes: Any = torch._C._len_torch_dispatch_stack
"""How many TorchDispatchModes are on: torch.export, make_fx and fake tensors."""
function_modes: Any = torch._C._len_torch_function_stack
"""How many TorchFunctionModes this thread has entered; a default device is one."""
functorch_interpreter: Any = torch._C._functorch.peek_interpreter_stack
"""The innermost transform of torch.func, or None."""
is_functorch_tensor: Any = torch._C._functorch.is_functorch_wrapped_tensor
tracing_state: Any = torch._C._get_tracing_state
"""The trace of torch.jit.trace, or None."""
autocast_on: Any = torch._C._is_any_autocast_enabled
"""Whether autocast is on for some device. The public question needs the device, which most forwards need not find."""

# The backward that runs. tests/caching/test_regions_that_run_again.py and test_once.py
current_backward: Any = torch._C._current_graph_task_id
"""The number of the backward that runs in this thread, or -1."""
will_execute: Any = torch._C._will_engine_execute_node
"""Whether the backward that runs reaches a node; `autograd.grad` reaches only what leads to its inputs."""
saved_tensor_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks
"""The pair of hooks of the innermost `saved_tensors_hooks`; checkpoints install one."""

# Calls that a mode or a subclass must not see. tests/capture/test_wrong_recordings.py
set_grad_enabled: Any = torch._C._set_grad_enabled
"""What `torch.no_grad` and its relatives call; a TorchFunctionMode sees the call."""
without_modes: Any = torch._C.DisableTorchFunction
without_subclasses: Any = torch._C.DisableTorchFunctionSubclass

# Functions that a graph in a file may call. tests/serialization
tensor_functions: Any = torch._C._VariableFunctions
nn_functions: Any = torch._C._nn
operator_names: Any = torch._C._dispatch_get_all_op_names

weight_norm_with_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch._weight_norm_interface
"""`torch._weight_norm` that returns the norm, too: one pass over the weight."""
weight_norm_backward: Callable[..., tuple[torch.Tensor, torch.Tensor]] = (
    torch.ops.aten._weight_norm_interface_backward.default
)
"""Its derivative. tests/parametrizations/test_norms.py"""
foreach_copy: Any = torch._foreach_copy_
foreach_divide: Any = torch._foreach_div_
foreach_norm: Any = torch._foreach_norm
foreach_over: Any = torch._foreach_div
foreach_times: Any = torch._foreach_mul
"""What torch's optimizers call for lists of tensors: one call from Python for all. tests/passes/test_together.py"""

_DEVICES = ("cpu", "cuda")


def ambient_state() -> tuple[Any, ...]:
    """Return the modes of this thread that change what an operation does, and that a graph does not show."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast_on() and [torch.get_autocast_dtype(device) for device in _DEVICES],
        torch.get_default_dtype(),
        saved_tensor_hooks(False),
        dispatch_modes(),
    )


def composable_keys() -> tuple[str, str]:
    """Return the attributes in which `fully_shard` and its relatives note themselves in a module."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    return REGISTRY_KEY, STATE_KEY


def inductor() -> Any:
    """Return the module with `aoti_compile_and_package` and `aoti_load_package`: documented there, slow to import."""
    import torch._inductor

    return torch._inductor


def when_backward_ends(run: Any) -> None:
    """Call `run` when the backward that runs has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(run)
