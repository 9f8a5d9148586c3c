"""bake and apply for checkpoints that need not fit into memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.language import Spec, load_spec
from rewriter.planning import Plan
from rewriter.streaming._layout import shards_of
from rewriter.streaming._output import Written, write_output
from rewriter.streaming._plan import CheckpointPlan, Factory, plan_checkpoint


@dataclass(frozen=True)
class Streamed:
    """What a verb did.

    Arguments:
        plan: which rule owns which tensors.
        names: of the tensors that were computed.
        written: the files.
    """

    plan: Plan
    names: list[str]
    written: Written


def bake_checkpoint(
    path: str | os.PathLike[str], spec: Any, output: str | os.PathLike[str], *, model: Factory | None = None, **how: Any
) -> Streamed:
    """Write the plain tensors of a checkpoint, one site in memory at a time.

    >>> import tempfile, torch
    >>> from safetensors.torch import load_file, save_file
    >>> rules = {"reparam": 1, "rules": [{"name": "s", "select": "fc.weight", "chain": ["symmetric"]}]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     stored = {"fc.parametrizations.weight.original": torch.tensor([[1.0, 2.0], [0.0, 3.0]])}
    ...     save_file(stored, f"{folder}/rewritten.safetensors")
    ...     _ = bake_checkpoint(f"{folder}/rewritten.safetensors", rules, f"{folder}/plain.safetensors")
    ...     load_file(f"{folder}/plain.safetensors")["fc.weight"]
    tensor([[1., 2.],
            [2., 3.]])

    A tensor that is stored as a plain value becomes the value that `rewrite` and `bake` give it.

    Arguments:
        path: a safetensors file, a shard index, or a folder.
        spec: anything that `load_spec` takes.
        output: a file for a file, a folder for anything else.
        model: makes the model on the meta device, for selectors that ask for its modules.
        how: `force`, `resume`, `workers` and `report`, see `write_output`.

    Raises:
        ModelFileError: an input is damaged, or the output cannot be written.
        PlanError: the spec does not fit, or a chain refuses a value.
    """
    return _write("bake", plan_checkpoint(Path(path), _spec(spec), model), output, how)


def apply_checkpoint(
    path: str | os.PathLike[str], spec: Any, output: str | os.PathLike[str], *, model: Factory | None = None, **how: Any
) -> Streamed:
    """Write a checkpoint of the model that `rewrite` gives, one site in memory at a time.

    The keys are those of its state dict. What constructors draw at random depends on the name of the tensor.

    Arguments:
        path, spec, output, model, how: as for `bake_checkpoint`.

    Raises:
        ModelFileError, PlanError: as for `bake_checkpoint`.
    """
    return _write("apply", plan_checkpoint(Path(path), _spec(spec), model), output, how)


def _spec(spec: Any) -> Spec:
    return spec if isinstance(spec, Spec) else load_spec(spec)


def _write(verb: str, made: CheckpointPlan, output: str | os.PathLike[str], how: dict[str, Any]) -> Streamed:
    work = made.baked() if verb == "bake" else made.rewritten()
    job = {"verb": verb, "spec": made.plan.spec.to_dict()}
    written = write_output(made.checkpoint, shards_of(made.checkpoint, work), Path(output), job, **how)
    return Streamed(made.plan, [one.name for one in work], written)
