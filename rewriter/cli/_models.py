"""The tensors of a model that is a module or an ExportedProgram."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from rewriter.planning import Entry


def entries_of(model: nn.Module | ExportedProgram) -> list[Entry]:
    """List the tensors of a model in its own order, computed tensors included."""
    from rewriter.program import entries_of

    return entries_of(model)


def state_of(model: nn.Module | ExportedProgram) -> dict[str, Tensor]:
    """Return the state dict."""
    from torch import nn

    return dict(model.state_dict() if isinstance(model, nn.Module) else model.state_dict)
