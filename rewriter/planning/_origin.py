"""The model that a plan was made for, and whether it has changed since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from rewriter.capture import Call

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Origin:
    """What `plan` was given.

    Arguments:
        model: the module or program.
        mode: the capture asked for.
        call: example inputs.
        without: passes left out.
    """

    model: Any
    mode: str = "auto"
    call: Call | None = None
    without: Sequence[str] = ()
    fingerprint: Mapping[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", dict(_parts(self.model)))

    def change(self, model: Any) -> str:
        """Return what differs between `model` and the model as it was planned; ``""`` if nothing does."""
        if model is not self.model:
            return "it was made for another model"
        now = dict(_parts(model))
        for name in [*self.fingerprint, *now]:
            if name not in now:
                return f"{name} is gone"
            if name not in self.fingerprint or not _same(self.fingerprint[name], now[name]):
                return f"{name} has changed"
        return ""


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a plan depends on: tensors with their versions, classes, modes, hooks and plain attributes."""
    if isinstance(model, ExportedProgram):
        yield "the graph", (model.graph_module, len(model.graph.nodes))
        yield from ((name, _tensor(value)) for name, value in {**model.constants, **model.state_dict}.items())
        return
    for path, module in model.named_modules(remove_duplicate=False):
        yield path or "the model", (module, type(module), _plain(module))
        prefix = f"{path}." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield prefix + name, _tensor(tensor)


def _plain(module: nn.Module) -> list[Any]:
    state = dict(sorted(vars(module).items()))  # tracing changes the order
    plain = [(key, value) for key, value in state.items() if isinstance(value, _PLAIN)]
    lists = [(key, list(value)) for key, value in state.items() if type(value) in (list, tuple)]
    return [plain, lists, state.get("forward"), [tuple(state[hooks]) for hooks in _HOOKS if hooks in state]]


def _tensor(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or is_lazy(tensor):
        return (tensor,)
    version = None if tensor.is_inference() else tensor._version
    memory = tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta else None
    return (tensor, version, memory, tensor.shape, tensor.dtype, tensor.requires_grad)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, (Tensor, nn.Module)):
        return one is other
    return one is other or bool(type(one) is type(other) and isinstance(one, _PLAIN) and one == other)
