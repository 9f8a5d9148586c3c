"""Reading a model file without running code of it."""

from __future__ import annotations

import inspect
import os
import shlex
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.export import ExportedProgram

from rewriter._given import kind_of
from rewriter.errors import ModelFileError, WeightsError, printable
from rewriter.serialization._adapter import is_adapter, read_adapter_with
from rewriter.serialization._checkpoint import entry_of, weights_of, without_prefixes
from rewriter.serialization._inspect import ModelFile, inspect_file
from rewriter.serialization._names import import_object, is_listed, known_object
from rewriter.serialization._safetensors import read_safetensors
from rewriter.serialization._vet import check_depth, vetted_reading

ModelFactory = Callable[[], nn.Module]

_unpickling = threading.Lock()


def load_model(
    path: str | os.PathLike[str],
    *,
    model: str | ModelFactory | None = None,
    key: str | None = None,
    allow: Iterable[str] = (),
    trust: bool = False,
    file_dtypes: bool = False,
) -> nn.Module | ExportedProgram:
    """Read a model: a saved module or GraphModule, an ExportedProgram, or weights for the module that `model` makes.

    >>> import tempfile, torch
    >>> from rewriter.serialization import save_model
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(torch.nn.Linear(2, 3), f"{folder}/linear.pt")
    ...     load_model(f"{folder}/linear.pt")
    Linear(in_features=2, out_features=3, bias=True)

    Modules made of torch.nn classes, and files that reparam wrote, load as they are. Every other class or function
    that a file uses has to be allowed, since the file decides with which arguments it is called. A ``.pt2`` file has to
    be trusted. docs/security.md says what each format can do. Tensors are read to the CPU.

    Arguments:
        path: ``.pt`` (module or state dict), ``.pt2`` or ``.safetensors``. The content decides, not the name. Or the
            folder of a PEFT adapter, see `read_adapter`, for a model with ``lora`` or ``dora``.
        model: for weights, the function that makes their module: ``"package.module:factory"`` or a callable.
        key: the entry of a training checkpoint that is the model; not needed for the usual ones.
        allow: dotted names that the file may use, or ``package.*``.
        trust: run any code of the file.
        file_dtypes: give the floating-point tensors of the module the dtypes that the weights have, before they load.

    Raises:
        ModelFileError: the file cannot be read, is of another kind, or uses names that are not allowed.
    """
    if is_adapter(Path(path)):
        return _with_adapter(Path(path), model, key)
    file = inspect_file(Path(path))
    if file.kind == "exported":
        if model is not None:
            raise ModelFileError(f"{path} holds an ExportedProgram, a whole model; leave the model factory out")
        return _read_exported(file.path, trust)
    factory = factory_of(model)
    loaded = _read(file, tuple(allow), trust)
    if key is not None:
        loaded = entry_of(file.path, loaded, key)
    if isinstance(loaded, nn.Module):
        if factory is not None:
            raise ModelFileError(f"{path} holds a whole {type(loaded).__name__}; leave the model factory out")
        return loaded
    weights = weights_of(file.path, loaded)
    if factory is None:
        text = f"{path} holds weights without their model; say whose (--model package.module:factory)"
        raise WeightsError(text, weights=weights)
    return _filled(file.path, _made(factory), weights, file_dtypes)


def read_adapter(path: str | os.PathLike[str]) -> OrderedDict[str, torch.Tensor]:
    """Return an adapter that PEFT saved, as a state dict for `load_state_dict` of a rewritten model.

    The model has ``lora`` or ``dora`` where the adapter changes a weight. Loading compares ranks, scales and places,
    and keeps the model's other tensors, the base of each site among them.

    Arguments:
        path: the folder that PEFT's ``save_pretrained`` wrote. LoRA, rsLoRA and DoRA are read.

    Raises:
        ModelFileError: a file is missing or damaged, or the adapter is of another kind.
    """
    return read_adapter_with(lambda file: weights_of(file, _read(inspect_file(file), (), False)), Path(path))


def _with_adapter(path: Path, model: str | ModelFactory | None, key: str | None) -> nn.Module:
    factory = factory_of(model)
    if factory is None:
        raise ModelFileError(
            f"{path} holds a PEFT adapter without its model; say whose (--model package.module:factory)"
        )
    if key is not None:
        raise ModelFileError(f"{path} holds a PEFT adapter, which has no entry {key!r}; leave the key out")
    weights, module = read_adapter(path), _made(factory)
    if not any(name.endswith(".0.lora_A") for name in module.state_dict()):
        raise WeightsError(
            f"{path} holds a PEFT adapter, and no tensor of the {type(module).__name__} is computed by lora or dora: "
            "let the factory rewrite the model",
            module,
            weights,
        )
    return _filled(path, module, weights)


def _read(file: ModelFile, allow: tuple[str, ...], trust: bool) -> Any:
    if file.kind == "safetensors":
        return read_safetensors(file.path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if trust:
                loaded = torch.load(file.path, map_location="cpu", weights_only=False)
                if isinstance(loaded, nn.Module):
                    check_depth(loaded)
                return loaded
            # torch has one list of safe names for the process: another reader must not inherit this one.
            with _unpickling:
                names = _allowed_names(file, allow)
                with torch.serialization.safe_globals(names), vetted_reading(allow) as vetted:
                    return vetted(torch.load(file.path, map_location="cpu", weights_only=True))
    except ModelFileError:
        raise
    except Exception as problem:
        raise ModelFileError(f"{file.path} cannot be read: {_reason(file, problem)}") from problem


def _reason(file: ModelFile, problem: Exception) -> str:
    if isinstance(problem, RecursionError):
        return "it is nested too deeply"
    text = str(problem).partition("WeightsUnpickler error:")[2] or str(problem)
    reason = printable(text.strip().partition("\n")[0].partition(" Please use")[0]) or type(problem).__name__
    if file.kind == "legacy":
        return f"{reason}\nOf torch.save's old format, only weights are read without --trust; save a module again"
    if "Unsupported operand" in reason:
        return f"{reason}\nIf it is not damaged, its pickle protocol is not torch.save's own, and needs --trust"
    return reason


_FEW = 4
"""Up to so many names are allowed one by one. More of one package are allowed as a whole."""


def _allowed_names(file: ModelFile, allow: tuple[str, ...]) -> list[Any]:
    allowed: list[Any] = []
    refused: list[str] = []
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file.path) if file.kind == "torch" else ()
    for name in sorted(unsafe):
        known = known_object(name)
        if known is None and is_listed(name, allow):
            known = [(import_object(name), name)]
        if known is None:
            refused.append(name)
        else:
            allowed.extend(known)
    if refused:
        raise ModelFileError(_refusal(file, refused))
    return allowed


def _read_exported(path: Path, trust: bool) -> ExportedProgram:
    if not trust:
        raise ModelFileError(
            f"{path} is an ExportedProgram, and torch's reader of such files runs code that is in them.\n"
            "If you know where the file comes from, trust it: --trust (trust=True in Python)."
        )
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            return torch.export.load(file)
    except Exception as problem:
        text = str(problem).partition("\n")[0] or type(problem).__name__
        raise ModelFileError(f"{path} cannot be read as an ExportedProgram: {text}") from problem


def _is_rewritten(names: Iterable[str]) -> bool:
    return any(".parametrizations." in name for name in names)


def _refusal(file: ModelFile, refused: list[str]) -> str:
    names = {printable(name): _warning(name) for name in refused}
    packages = {name.partition(".")[0] for name in names}
    short = len(names) > _FEW and len(packages) == 1 and not any(names.values())
    patterns = [f"{package}.*" for package in packages] if short else list(names)
    lines = [
        f"{file.path} uses classes or functions that are not torch.nn's:",
        *(f"  {name}{warning}" for name, warning in names.items()),
        "If you know where the file comes from, allow them: "
        + " ".join(f"--allow {shlex.quote(name)}" for name in patterns)
        + f" (allow={patterns} in Python)",
        "or trust the file as a whole: --trust (it may then run any code).",
    ]
    return "\n".join(lines)


def _warning(name: str) -> str:
    if name.startswith("rewriter."):
        return "   (of another version of reparam: read the file with that version, and take its state dict)"
    if name == "torch.fx.graph_module.reduce_graph_module":
        return "   (a GraphModule that torch.save wrote as source code; allowing this runs it)"
    if name in ("builtins.getattr", "builtins.eval", "builtins.exec", "builtins.__import__", "builtins.open"):
        return "   (allowing this allows everything)"
    return ""


def _tied(module: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # A safetensors file has tied tensors under one of their names.
    tensors = module.state_dict(keep_vars=True)
    stored = {id(tensors[name]): value for name, value in weights.items() if name in tensors}
    return {name: stored[id(tensor)] for name, tensor in tensors.items() if id(tensor) in stored}


def factory_of(model: str | ModelFactory | None) -> ModelFactory | None:
    """Return the function that makes a model, imported if it is given as ``package.module:factory``."""
    if isinstance(model, nn.Module):
        raise ModelFileError("model is a function or class that makes the module, not the module: model=lambda: net")
    if not isinstance(model, str):
        return model
    module, colon, name = model.partition(":")
    if not colon or not module or not name:
        raise ModelFileError(f"a model factory is given as package.module:factory, not {model!r}")
    factory = import_object(model)
    if not callable(factory):
        raise ModelFileError(f"{model!r} is {kind_of(factory)}, not something that makes a model")
    return cast("ModelFactory", factory)


def _made(factory: ModelFactory) -> nn.Module:
    name = getattr(factory, "__qualname__", type(factory).__name__)
    try:
        inspect.signature(factory).bind()
    except ValueError:  # functions written in C may have no signature
        pass
    except TypeError as problem:
        raise ModelFileError(
            f"the model factory {name} is called without arguments: {problem}; write a function that makes the model"
        ) from problem
    module = factory()
    if not isinstance(module, nn.Module):
        raise ModelFileError(f"the model factory made {kind_of(module)}, not a torch.nn.Module")
    return module


def _take_dtypes(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in module.state_dict(keep_vars=True).items():
        both = [one for one in (tensor, weights.get(name)) if isinstance(one, torch.Tensor)]
        if len(both) == 2 and all(map(torch.is_floating_point, both)):
            tensor.data = tensor.data.to(both[1].dtype)


def _filled(path: Path, module: nn.Module, weights: dict[str, torch.Tensor], file_dtypes: bool = False) -> nn.Module:
    weights = without_prefixes(weights, module.state_dict().keys())
    weights.update({name: tensor for name, tensor in _tied(module, weights).items() if name not in weights})
    if file_dtypes:
        _take_dtypes(module, weights)
    try:
        module.load_state_dict(weights)
    except RuntimeError as problem:
        own = module.state_dict().keys()
        if _is_rewritten(weights.keys() - own) and not _is_rewritten(own):
            raise WeightsError(
                f"{path} has the weights of a rewritten model: `reparam apply SPEC {path} -o OUT` loads them into one, "
                f"`reparam bake {path} --spec SPEC -o OUT` bakes them (in Python: rewrite(model, "
                "spec).load_state_dict(weights))",
                module,
                weights,
            ) from problem
        lines = [printable(line.strip()) for line in str(problem).split("\n")]
        text = f"the weights in {path} do not fit the model: " + " ".join(lines[1:])
        raise (ModelFileError(text) if _is_rewritten(own) else WeightsError(text, module, weights)) from problem
    return module
