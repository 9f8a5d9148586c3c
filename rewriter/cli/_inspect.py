"""``reparam inspect``: the tensors of a model file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group

from rewriter.cli._app import command
from rewriter.cli._models import entries_of, state_of
from rewriter.cli._options import ModelFile, ModelOptions
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import counted, shape_text, table

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.planning import Entry


@command("reparam inspect rewritten.pt")
def inspect(
    model_file: ModelFile,
    model_options: ModelOptions,
) -> Outcome:
    """List the tensors of MODEL, with the chain and the rule of each computed tensor.

    Weights need no --model here.
    """
    read = model_options.read_or_weights(model_file)
    kind = "weights" if isinstance(read, dict) else type(read).__name__
    if isinstance(read, dict):
        tensors = [_weight(name, tensor) for name, tensor in state_of(read).items()]
    else:
        tensors = [_described(entry) for entry in entries_of(read)]
    document = {"model": str(model_file), "class": kind, "tensors": tensors}
    rows = [
        (
            " = ".join(tensor["names"]),
            tensor["kind"],
            shape_text(tensor["shape"]),
            tensor["dtype"],
            " >> ".join(tensor["chain"]) if tensor["chain"] is not None else "",
            tensor["rule"] or "",
        )
        for tensor in tensors
    ]
    computed = sum(tensor["chain"] is not None for tensor in tensors)
    head = f"{model_file}: {kind}, {counted(len(tensors), 'tensor')}, {computed} of them computed"
    return Outcome(document, Group(head, "", table(("tensor", "kind", "shape", "dtype", "chain", "rule"), rows)))


def _weight(name: str, tensor: Tensor) -> dict[str, Any]:
    """Describe a tensor of a file that has no model."""
    unknown = dict.fromkeys(("requires_grad", "chain", "rule", "cache"))
    form = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    return {"names": [name], "kind": "tensor", **form, **unknown}


def _described(entry: Entry) -> dict[str, Any]:
    info, record = entry.infos[0], entry.site.spec if entry.site else None
    return {
        "names": list(entry.names),
        "kind": info.kind,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "requires_grad": info.requires_grad,
        "chain": list(record.chain) if record else None,
        "rule": record.rule if record else None,
        "cache": record.cache if record else None,
    }
