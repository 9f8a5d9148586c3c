"""Writing a model file that can be read without trusting it."""

from __future__ import annotations

import os
import pickle
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.utils.parametrize import ParametrizationList

from rewriter._given import check_model, is_distributed
from rewriter.errors import ModelFileError, RewriterError
from rewriter.serialization._atomic import written_atomically
from rewriter.serialization._graph_data import graph_from_data, graph_to_data
from rewriter.serialization._graph_values import is_identifier
from rewriter.serialization._names import loadable
from rewriter.serialization._vet import check_depth, when_vetted

_GRAPH_MODULE_OWN = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(vars(nn.Module()))
_MADE_FROM_GRAPH = _GRAPH_MODULE_OWN | {"_in_spec", "_out_spec"}


def save_model(model: nn.Module | ExportedProgram, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write `model` to `path`, for `load_model`: the whole file, or nothing.

    A torch.fx graph is stored as data and not as source code, so that reading the file runs no code.

    Arguments:
        path: ``.pt`` for a module, ``.pt2`` for an ExportedProgram.
        force: overwrite what is there.

    Raises:
        ModelFileError: the file exists already, or the model has something that cannot be stored.
    """
    check_model(model, "save_model")
    check_suffix(model, path)
    with written_atomically(path, force=force) as temporary:
        write_model(model, temporary)


def check_suffix(model: nn.Module | ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Refuse a file name that says it is another kind of file.

    Raises:
        ModelFileError: such as a module as ``.pt2``.
    """
    suffix = Path(path).suffix.lower()
    if isinstance(model, nn.Module) and suffix in (".pt2", ".safetensors", ".onnx", ".ts"):
        raise ModelFileError(
            f"{path}: a module is saved as .pt; {suffix} is an export of a baked model: save as .pt, then "
            f"`reparam bake MODEL.pt -o {path}` (export_model in Python)"
        )
    if isinstance(model, ExportedProgram) and suffix in (".pt", ".pth", ".safetensors", ".onnx"):
        raise ModelFileError(f"an ExportedProgram is saved as .pt2, not {suffix}")


def refuse_distributed(model: nn.Module) -> None:
    """Refuse a model of which this process has only a part of each tensor.

    Raises:
        ModelFileError: says how to save it.
    """
    if any(map(is_distributed, (*model.parameters(), *model.buffers()))):
        raise ModelFileError(
            f"the tensors of the {type(model).__name__} are distributed over processes: save model.state_dict() with "
            "torch.distributed.checkpoint, which every process calls; for a file of the whole model, let one process "
            "load the checkpoint into a model that is not distributed (dcp.load(…, no_dist=True)), and save that"
        )


def write_model(model: nn.Module | ExportedProgram, path: Path) -> None:
    """Write `model` to `path` in place, whatever is there."""
    if isinstance(model, nn.Module):
        check_depth(model)
        refuse_distributed(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A file and not its path: torch.save would write the temporary file's name into the archive.
            with path.open("wb") as file:
                if isinstance(model, ExportedProgram):
                    torch.export.save(model, file)
                else:
                    torch.save(model, file, pickle_module=_Pickling)
    except (RewriterError, OSError):
        raise
    except Exception as problem:
        reason = _parametrized(model)
        if not reason:
            text = str(problem).partition("\n")[0] or type(problem).__name__
            reason = f"{text} (its classes and functions need module-level names)"
        raise ModelFileError(f"the {type(model).__name__} cannot be saved: {reason}") from problem


def _parametrized(model: nn.Module | ExportedProgram) -> str:
    """Return what to do about a module with a class that torch.nn.utils.parametrize made, or nothing."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        found = module._modules.get("parametrizations")
        if isinstance(found, nn.ModuleDict) and any(isinstance(one, ParametrizationList) for one in found.values()):
            return (
                f"torch.nn.utils.parametrize computes a tensor of {path or 'it'}, and made a class that no file can "
                "name: bake the model first (rewriter.bake(rewriter.absorb(model))), or save its state dict"
            )
    return ""


@loadable()
def restore_graph_module(name: str, graph: dict[str, Any], state: dict[str, Any]) -> fx.GraphModule:
    """Return the GraphModule that `save_model` stored.

    Arguments:
        name: the name of its class.
        graph: as `graph_to_data` gave it.
        state: its modules, tensors and plain attributes.
    """
    if not is_identifier(name) or not isinstance(state, dict):
        raise ModelFileError(f"the file's graph module is damaged: it is called {name!r:.100}")
    module = fx.GraphModule.__new__(fx.GraphModule)
    nn.Module.__init__(module)
    module.__dict__.update({key: value for key, value in state.items() if key not in _MADE_FROM_GRAPH})

    def finish() -> None:
        read = dict(vars(module))
        module.__init__(nn.Module(), fx.Graph(), class_name=name)  # type: ignore[misc]
        module.__dict__.update(read)
        module.graph = graph_from_data(graph, module)

    when_vetted(module, finish)
    return module


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        # A subclass with its own __reduce__ is left alone.
        if isinstance(obj, fx.GraphModule) and type(obj).__reduce__ is fx.GraphModule.__reduce__:
            state = {key: value for key, value in vars(obj).items() if key not in _MADE_FROM_GRAPH}
            return restore_graph_module, (type(obj).__name__, graph_to_data(obj.graph), state)
        return NotImplemented


_Pickling: Any = types.SimpleNamespace(Pickler=_Pickler, __name__="rewriter.io", dumps=pickle.dumps)
