"""Every tensor of a model, each once, with all its names and owners."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from rewriter.errors import PlanError
from rewriter.language import TensorInfo, class_names
from rewriter.sites import Site, plain_class, sites_of
from rewriter.sites._places import CONTAINER


@dataclass
class Entry:
    """One tensor: a parameter, a buffer, or a value that a site already computes.

    Arguments:
        infos: what a selector sees of it, one for each name.
        owners: the module and attribute of each distinct place; fewer than names when a module has several names.
        tensor: the tensor itself; ``None`` for the value of a site.
        persistent: whether a buffer is part of the state dict.
        site: the site that computes it.
    """

    infos: list[TensorInfo]
    owners: list[tuple[nn.Module, str]]
    tensor: Tensor | None
    persistent: bool = True
    site: Site | None = None

    @property
    def name(self) -> str:
        """The first name, in the model's order."""
        return self.infos[0].name

    @functools.cached_property  # once the survey is complete
    def names(self) -> tuple[str, ...]:
        """Every name, in the model's order."""
        return tuple(info.name for info in self.infos)


def survey(model: nn.Module) -> list[Entry]:
    """List the tensors of `model` in its own order; a computed tensor stays in its place."""
    entries: dict[tuple[int, str], Entry] = {}
    for path, module in _modules(model, ""):
        for name, tensor, site in _tensors(module):
            key = (id(site), site.member(name).tensor) if site is not None else (id(tensor), "")
            full = f"{path}.{name}" if path else name
            entry = entries.get(key)
            info = _info(full, name, module, tensor, site)
            if entry is None:
                persistent = name not in module._non_persistent_buffers_set
                entries[key] = Entry([info], [(module, name)], tensor, persistent, site)
            else:
                entry.infos.append(info)
                if (module, name) not in entry.owners:
                    entry.owners.append((module, name))
    return list(entries.values())


def refuse_strays(model: nn.Module, known: Container[Site | None]) -> None:
    """Refuse a model with a site that computes a tensor of no module: torch.fx made its graph of a rewritten model's.

    Raises:
        PlanError: there is one.
    """
    for path, module in model.named_modules():
        if isinstance(module, Site) and module not in known:
            raise PlanError(
                f"{path} computes {module.spec.name} in a graph that torch.fx made of a rewritten model, which no "
                "longer says where the value came from: rewrite and bake the model itself, and trace it again "
                "afterwards"
            )


def _modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():
        if child is None or (name == CONTAINER and sites_of(module)):
            continue
        if name == CONTAINER and parametrize.is_parametrized(module):
            continue
        yield from _modules(child, f"{path}.{name}" if path else name)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | None, Site | None]]:
    sites = sites_of(module)
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if name in sites:
            yield name, None, sites[name]
        elif tensor is not None:
            yield name, tensor, None


def _info(full: str, name: str, module: nn.Module, tensor: Tensor | None, site: Site | None) -> TensorInfo:
    kind_of_owner: Any = plain_class(module)
    classes = _class_names(kind_of_owner)
    if site is not None:
        member = site.member(name)
        kind, shape, dtype, trained = member.kind, member.shape, member.dtype, member.requires_grad
    else:
        assert tensor is not None
        kind = "parameter" if name in module._parameters else "buffer"
        shape = () if is_lazy(tensor) else tuple(tensor.shape)
        dtype, trained = dtype_name(tensor.dtype), tensor.requires_grad
    return TensorInfo(full, classes, "parameter" if kind == "parameter" else "buffer", shape, dtype, trained)


@functools.lru_cache(maxsize=64)
def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def _class_names(kind: Any) -> tuple[str, ...]:
    return class_names(kind)
