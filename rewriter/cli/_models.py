"""The tensors of a model that is a module or an ExportedProgram."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from rewriter.planning import Entry


Model: TypeAlias = "nn.Module | ExportedProgram | dict[str, Tensor]"


def entries_of(model: Model) -> list[Entry]:
    """List the tensors of a model in its own order, computed tensors included; none for weights without a model."""
    from rewriter.program import entries_of

    return [] if isinstance(model, dict) else entries_of(model)


def state_of(model: Model) -> dict[str, Tensor]:
    """Return the state dict."""
    from torch import nn

    if isinstance(model, dict):
        return {name: tensor for name, tensor in model.items() if hasattr(tensor, "dtype")}
    return dict(model.state_dict() if isinstance(model, nn.Module) else model.state_dict)


def values_of(model: Model) -> dict[str, Tensor]:
    """Return the tensors of a model by each of their names, computed ones as values."""
    from torch import nn

    from rewriter._bake import bake

    if not isinstance(model, dict) and any(entry.site is not None for entry in entries_of(model)):
        model = bake(model)
    if not isinstance(model, nn.Module):
        return state_of(model)
    entries = entries_of(model)
    return {name: entry.tensor.detach() for entry in entries if entry.tensor is not None for name in entry.names}
