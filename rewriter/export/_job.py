"""What is exported: a copy in eval mode, the call that it is captured with, and its outputs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from rewriter._torch import pytree
from rewriter.bindings._pretrained import is_pretrained
from rewriter.capture import Call
from rewriter.errors import CaptureError
from rewriter.export._dynamic import in_order
from rewriter.export._read_back import plain
from rewriter.program import entries_of


@dataclasses.dataclass
class Job:
    """One export.

    Arguments:
        model: what is exported; torch may run, trace and change it.
        call: example arguments.
        provenance: JSON text for the file.
        name: the file's name at the end; while it is written, its name is another.
        train: whether modules keep their modes.
    """

    model: nn.Module | ExportedProgram
    call: Call | None
    provenance: str
    name: str
    train: bool
    note: str = ""
    """A warning for the user."""
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    """Further texts for the header of a safetensors file."""
    beside: list[Path] = dataclasses.field(default_factory=list)
    """Further files that were written."""

    @functools.cached_property
    def program(self) -> ExportedProgram:
        """The model as a program.

        Raises:
            CaptureError: there are no example inputs.
        """
        if isinstance(self.model, ExportedProgram):
            return self.model
        if self.call is None:
            raise CaptureError("the format needs example inputs: example_inputs=(…,)")
        call = self.call
        return torch.export.export(
            self.model, tuple(call.args), dict(call.kwargs), dynamic_shapes=call.dynamic_shapes, strict=False
        )

    @property
    def module(self) -> nn.Module:
        """The model as a module."""
        model: nn.Module = self.model.module() if isinstance(self.model, ExportedProgram) else self.model
        return model

    @property
    def computed(self) -> str:
        """The first computed tensor with its chain, or an empty text."""
        sites = ((entry.name, entry.site.spec) for entry in entries_of(self.model) if entry.site is not None)
        return next((f"{name} = {' >> '.join(spec.chain)}" for name, spec in sites), "")


def job_for(
    model: nn.Module | ExportedProgram, call: Call | None, provenance: str, path: Path, *, train: bool, whole: bool
) -> Job:
    """Return the job; the model is copied, unless its tensors alone are written.

    Arguments:
        whole: the format has the model's forward in another form.
    """
    if isinstance(model, ExportedProgram):
        if call is None and model.example_inputs is not None:
            args, kwargs = model.example_inputs
            call = Call(args, kwargs)
    elif whole:
        model = copy.deepcopy(model)
        if not train:
            model.eval()
        if call is not None:
            call = in_order(model, call)
            _make_outputs_plain(model, call)
    return Job(model, call, provenance, path.name, train)


def _make_outputs_plain(model: nn.Module, call: Call) -> None:
    """Let the forward return tuples, lists and dicts where it returns dataclasses: readers do not know their classes.

    A transformers model returns no cache: its class is no data of a file.
    """
    config = getattr(model, "config", None)
    if config is not None and is_pretrained(type(model)) and getattr(config, "use_cache", False):
        config.use_cache = False
    found = outputs_of(copy.deepcopy(model), call)
    if _is_plain(found):
        return
    forward = model.forward

    @functools.wraps(forward)
    def plain_forward(*args: Any, **kwargs: Any) -> Any:
        return plain(forward(*args, **kwargs))

    model.forward = plain_forward


@torch.no_grad()
def outputs_of(module: nn.Module, call: Call, seed: int = 0) -> Any:
    """Return what the module gives; the random state is as before.

    Raises:
        CaptureError: it fails.
    """
    args, kwargs = copied_call(call)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return module(*args, **kwargs)
    except Exception as problem:
        reason = str(problem).strip().partition("\n")[0]
        raise CaptureError(f"the model fails on the example inputs: {type(problem).__name__}: {reason}") from problem


def copied_call(call: Call) -> tuple[Any, Any]:
    """Return the arguments with tensors of their own."""
    return pytree.tree_map(  # type: ignore[no-any-return]
        lambda value: value.clone() if isinstance(value, torch.Tensor) else value, (tuple(call.args), dict(call.kwargs))
    )


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(one is not None and _is_plain(one) for one in value.values())
    if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
        return False
    return not isinstance(value, (tuple, list)) or all(map(_is_plain, value))


def missing(*packages: str) -> list[str]:
    """Return those of `packages` that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]
