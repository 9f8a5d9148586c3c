"""Choose how the uses of the selected tensors are reached: through one graph, or through the modules that own them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from rewriter.capture._leaves import has_hooks, has_own_forward
from rewriter.capture._reason import KEPT
from rewriter.capture._trace import trace
from rewriter.errors import CaptureError
from rewriter.sites import plain_class

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Capture:
    """How the uses of a model's tensors are reached.

    Arguments:
        root: ``"graph"``, ``"module"`` or ``"export"``.
        graph: the graph, not yet rewritten; ``None`` in module mode.
        why: why there is no graph.
        opaque: path of a module that stays one node → why it could not be looked into.
        constants: tensors that the graph reads and the model does not have.
    """

    root: str
    graph: fx.Graph | None = None
    why: str = ""
    opaque: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)


def capture(model: nn.Module, owners: Sequence[str], mode: str = "auto") -> Capture:
    """Capture a model whose modules at `owners` have the selected tensors.

    Arguments:
        model: the model; unchanged afterwards.
        owners: paths of the modules whose tensors are selected.
        mode: ``"auto"``, ``"graph"`` (an error if there is no graph) or ``"module"``.

    Raises:
        CaptureError: `mode` is ``"graph"`` and the root cannot be traced; or an owner is a TorchScript module.
    """
    _refuse_compiled(model, owners)
    if isinstance(model, fx.GraphModule) and mode in ("auto", "graph"):
        own = _calls_of_own_forwards(model, owners)
        if not own:
            return Capture("graph", getattr(model, "captured", model.graph))
        if mode == "graph" or hasattr(model, "captured"):
            raise CaptureError(f"{_OWN_FORWARD.format(own[0])}, and takes no computed tensors as arguments")
        return Capture("module", why=_OWN_FORWARD.format(own[0]))
    if mode == "module":
        return Capture("module", why="asked for")
    if isinstance(model, torch.jit.ScriptModule):
        return Capture("module", why="compiled by TorchScript")
    if plain_class(model) is not type(model):
        return Capture("module", why="rewritten so before")
    try:
        traced = trace(model, _inside(model, owners))
    except CaptureError as problem:
        if mode == "graph":
            why = str(problem).removeprefix(f"{KEPT}; ")
            raise CaptureError(
                f"{why}; capture='auto' keeps the model's class and rewrites the modules that own the tensors"
            ) from problem
        return Capture("module", why=str(problem))
    return Capture("graph", traced.graph, opaque=traced.opaque)


_OWN_FORWARD = "the forward of {} was replaced on the object itself"


def _calls_of_own_forwards(model: fx.GraphModule, owners: Sequence[str]) -> list[str]:
    """Return the owners, and modules above them, that the graph calls and whose forward is not their class's."""
    above = {owner[:end] for owner in owners for end in range(1, len(owner) + 1) if owner[end : end + 1] in ("", ".")}
    called = {str(node.target) for node in model.graph.nodes if node.op == "call_module"}
    return [path for path in sorted(above & called) if has_own_forward(model.get_submodule(path))]


def _refuse_compiled(model: nn.Module, owners: Sequence[str]) -> None:
    compiled = isinstance(model, torch.jit.ScriptModule)
    for owner in dict.fromkeys(owners):
        if compiled or isinstance(model.get_submodule(owner), torch.jit.ScriptModule):
            raise CaptureError(
                f"{owner or 'the model'} is compiled by TorchScript, and its tensors are part of the program; "
                "rewrite the model before it is compiled, or leave the tensors out with `except`"
            )


def is_torch_leaf(module: nn.Module) -> bool:
    """Say whether torch wrote the module's forward: it is never traced through."""
    kind = plain_class(module)
    if has_own_forward(module):
        return False
    return kind.__module__.startswith(("torch.nn.modules.", "torch.ao.nn")) and not isinstance(module, _CONTAINERS)


def _inside(model: nn.Module, owners: Sequence[str]) -> set[str]:
    """Return the modules to inline: those from the root down to an owner."""
    inside = {""}
    for owner in dict.fromkeys(owners):
        module, path = model, ""
        for part in owner.split(".") if owner else ():
            module, path = module._modules[part], f"{path}.{part}" if path else part  # type: ignore[assignment]
            if has_own_forward(module) and has_hooks(module):
                raise CaptureError(f"{_OWN_FORWARD.format(path)}, and it has hooks")
            if has_hooks(module) or is_torch_leaf(module):
                break
            inside.add(path)
    return inside
