"""``reparam inspect``: the tensors of a model file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group

from rewriter.cli._app import command
from rewriter.cli._inputs import streamed
from rewriter.cli._models import entries_of, state_of
from rewriter.cli._options import ModelFile, ModelOptions
from rewriter.cli._outcome import Outcome
from rewriter.cli._streaming import tensors_of
from rewriter.cli._text import counted, shape_text, table
from rewriter.errors import printable

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.export import Stored
    from rewriter.planning import Entry


@command("reparam inspect rewritten.pt")
def inspect(
    model_file: ModelFile,
    model_options: ModelOptions,
) -> Outcome:
    """List the tensors of MODEL, with the chain and the rule of each computed tensor.

    MODEL can also be an export: TorchScript, AOTInductor, ONNX. An export says which chains its weights come from.
    Weights need no --model here.
    """
    from rewriter.export import read_contents, read_provenance

    if streamed(model_file, model_options.model is None):
        kind, tensors = "Checkpoint", tensors_of(model_file)
    elif (contents := read_contents(model_file)) is not None:
        kind, tensors = contents[0], [_stored(tensor) for tensor in contents[1]]
    else:
        read = model_options.read_or_weights(model_file)
        if isinstance(read, dict):
            kind, tensors = "weights", [_weight(name, tensor) for name, tensor in state_of(read).items()]
        else:
            kind, tensors = type(read).__name__, [_described(entry) for entry in entries_of(read)]
    origin = read_provenance(model_file)
    document = {"model": str(model_file), "class": kind, "tensors": tensors, "provenance": origin}
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
    return Outcome(
        document,
        Group(head, *_origin_lines(origin), "", table(("tensor", "kind", "shape", "dtype", "chain", "rule"), rows)),
    )


def _origin_lines(origin: dict[str, Any] | None) -> list[str]:
    """Say which chains the weights of an export come from."""
    tensors = (origin or {}).get("tensors")
    if origin is None or not isinstance(tensors, dict) or not tensors:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in dict(origin.get("versions") or {}).items())
    lines = [f"from {counted(len(tensors), 'computed tensor')}, plan {str(origin.get('plan'))[:12]}, {versions}:"]
    lines += [f"  {name} = {' >> '.join(one['chain'])} (rule {one['rule']})" for name, one in tensors.items()]
    return [printable(line) for line in lines]


def _stored(tensor: Stored) -> dict[str, Any]:
    nothing = dict.fromkeys(("requires_grad", "chain", "rule", "cache"))
    return {"names": [tensor.name], "kind": "stored", "shape": list(tensor.shape), "dtype": tensor.dtype, **nothing}


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
