"""Putting sites into the modules whose tensors they compute, and taking them off again.

An owner has an empty slot (`None`) for a computed tensor: it marks the tensor's place in the order of parameters and
shows in no state dict. Its class becomes a subclass of the same name, in which the tensor's
name is a property. Graphs never read that property; user code does, and so do modules that torch.fx cannot trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.jit import ScriptModule

from rewriter.bindings._owner_class import owner_class
from rewriter.context._forward import Contexts
from rewriter.sites._container import Sites, plain_class, sites_of, ways_to
from rewriter.sites._places import CONTAINER, CONTEXTS
from rewriter.sites._site import Site


def attach(owner: nn.Module, tensors: Sequence[str], site: Site) -> None:
    """Put `site` in the place of the tensors it computes; their slots stay, empty."""
    for tensor in tensors:
        _slots(owner, tensor)[tensor] = None
    if CONTAINER not in owner._modules:
        owner._modules[CONTAINER] = Sites()
    container = owner._modules[CONTAINER]
    assert isinstance(container, Sites)
    container.place(tensors[0], site)
    if getattr(owner, "max_norm", None) is not None:  # an embedding writes to its weight, to the same effect each time
        site.__dict__["renormed"] = True
    if isinstance(owner, nn.RNNBase):
        owner.__dict__.pop("_flat_weights", None)
    _adopt(owner, tuple(sites_of(owner)), site.contexts)


def detach(owner: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Take the site that computes the tensors in `values` off `owner`, and put the values in their slots."""
    container = owner._modules[CONTAINER]
    assert isinstance(container, nn.ModuleDict)
    del container[next(tensor for tensor in values if tensor in container)]
    if not len(container):
        del owner._modules[CONTAINER]
        release(owner)
    else:
        _adopt(owner, tuple(sites_of(owner)), next(iter(sites_of(owner).values())).contexts)
    for tensor, value in values.items():
        _slots(owner, tensor)[tensor] = value
    if isinstance(owner, nn.RNNBase) and CONTAINER not in owner._modules:
        owner._init_flat_weights()


def open_root(root: nn.Module, contexts: Contexts) -> None:
    """Make a call of `root` one forward: every site below it is evaluated once in it."""
    _adopt(root, tuple(sites_of(root)), contexts)


def open_path(root: nn.Module, names: Iterable[str], contexts: Contexts, itself: bool) -> None:
    """Open every module above the owners of the tensors called `names`: each can be called on its own.

    Arguments:
        root: the model.
        names: of tensors of the model.
        contexts: of the model.
        itself: open `root` too.
    """
    paths = ways_to({name.rpartition(".")[0] for name in names} - {""})
    for path in paths if itself else paths - {""}:
        module = root.get_submodule(path)
        callable_ = type(module).forward is not nn.Module.forward
        if callable_ and CONTEXTS not in module.__dict__ and not isinstance(module, (fx.GraphModule, ScriptModule)):
            open_root(module, contexts)


def release(module: nn.Module) -> None:
    """Give `module` its own class back."""
    if isinstance(module, fx.GraphModule):
        return
    object.__setattr__(module, "__class__", plain_class(module))
    module.__dict__.pop(CONTEXTS, None)


def _slots(owner: nn.Module, tensor: str) -> dict[str, Any]:
    return owner._parameters if tensor in owner._parameters else owner._buffers


def _adopt(owner: nn.Module, tensors: tuple[str, ...], contexts: Contexts) -> None:
    if isinstance(owner, fx.GraphModule):
        return
    plain: Any = plain_class(owner)
    # A class may guard its attributes with a __setattr__ of its own.
    object.__setattr__(owner, "__class__", owner_class(plain, tensors))
    owner.__dict__[CONTEXTS] = contexts
