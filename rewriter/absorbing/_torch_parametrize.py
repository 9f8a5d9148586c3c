"""torch.nn.utils.parametrize: a swapped class, a property, and ParametrizationLists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from rewriter.absorbing._source import Holder
from rewriter.sites._places import CONTAINER


def holders(module: nn.Module) -> Iterator[Holder]:
    """Find the tensors of `module` that torch's parametrizations compute."""
    container = module._modules.get(CONTAINER)
    if isinstance(container, nn.ModuleDict):
        for name, found in container.items():
            if isinstance(found, parametrize.ParametrizationList):
                yield _holder(module, container, name, found)


def _holder(module: nn.Module, container: nn.ModuleDict, name: str, found: parametrize.ParametrizationList) -> Holder:
    names = ["original"] if found.is_tensor else [f"original{index}" for index in range(found.ntensors)]

    def release() -> None:
        del container[name]
        # The class is shared with every copy of the model: it stays as it is, and the module leaves it.
        if not any(isinstance(other, parametrize.ParametrizationList) for other in container.values()):
            kind: Any = type(module).__bases__[0]
            module.__class__ = kind
            _remove_compatibility_hooks(module)
        if not len(container):
            del module._modules["parametrizations"]

    kind = "parameter" if any(original in found._parameters for original in names) else "buffer"
    stored = tuple((found, original) for original in names)
    return Holder("torch.parametrize", module, name, stored, lambda: list(found), release, kind)


def _remove_compatibility_hooks(module: nn.Module) -> None:
    """Remove what torch's weight_norm adds for reading old state dicts: a local function, which cannot be pickled."""
    for number, hook in list(module._load_state_dict_pre_hooks.items()):
        name = getattr(getattr(hook, "hook", hook), "__qualname__", "")
        if name == "weight_norm.<locals>._weight_norm_compat_hook":
            del module._load_state_dict_pre_hooks[number]
