"""``reparam inspect``: what is in a model file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewriter.cli._app import app
from rewriter.cli._inputs import read_model
from rewriter.cli._models import entries_of
from rewriter.cli._options import Allow, Debug, Factory, Json, ModelPath, Trust
from rewriter.cli._outcome import Outcome
from rewriter.cli._text import columns, shape_text

if TYPE_CHECKING:
    from rewriter.planning import Entry


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
    tensors = [_described(entry) for entry in entries_of(read)]
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


def _described(entry: Entry) -> dict[str, Any]:
    info, record = entry.infos[0], entry.site.record if entry.site else None
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
