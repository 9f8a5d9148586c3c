"""``reparam inspect``: what is in a model file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewriter.cli._app import app
from rewriter.cli._inputs import read_model
from rewriter.cli._options import Allow, Debug, Factory, Json, ModelPath, Trust
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import columns, shape_text

if TYPE_CHECKING:
    from torch import nn


@app.command()
def inspect(
    model_file: ModelPath,
    model: Factory = None,
    allow: Allow = None,
    trust: Trust = False,
    json: Json = False,
    debug: Debug = False,
) -> Outcome:
    """List the tensors of MODEL, and how those that are computed are computed."""
    read = read_model(model_file, model, allow, trust)
    from torch import nn

    tensors = _of_module(read) if isinstance(read, nn.Module) else _of_program(dict(read.state_dict))
    document = {"model": str(model_file), "class": type(read).__name__, "tensors": tensors}
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
    head = f"{model_file}: {type(read).__name__}, {len(tensors)} tensors, {computed} of them computed"
    return Outcome(document, f"{head}\n\n{columns(('tensor', 'kind', 'shape', 'dtype', 'chain', 'rule'), rows)}")


def _of_module(model: nn.Module) -> list[dict[str, Any]]:
    from rewriter.planning import survey

    tensors = []
    for entry in survey(model):
        info, record = entry.infos[0], entry.site.record if entry.site else None
        tensors.append(
            {
                "names": list(entry.names),
                "kind": info.kind,
                "shape": list(info.shape),
                "dtype": info.dtype,
                "requires_grad": info.requires_grad,
                "chain": list(record.chain) if record else None,
                "rule": record.rule if record else None,
                "cache": record.cache if record else None,
            }
        )
    return tensors


def _of_program(tensors: dict[str, Any]) -> list[dict[str, Any]]:
    from torch import nn

    return [
        {
            "names": [name],
            "kind": "parameter" if isinstance(tensor, nn.Parameter) else "buffer",
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "requires_grad": tensor.requires_grad,
            "chain": None,
            "rule": None,
            "cache": None,
        }
        for name, tensor in tensors.items()
    ]
