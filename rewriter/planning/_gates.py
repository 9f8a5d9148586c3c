"""A hint for recurrent kernels that stack one matrix for each gate."""

from __future__ import annotations

from collections.abc import Sequence

_WHOLE = {"orthogonal", "stiefel"}
_GATES = (3, 4)
"""GRU and LSTM."""


def gates_hint(name: str, shape: Sequence[int], chain: Sequence[str]) -> str:
    """Return what to write if `chain`, which sees the whole tensor, should act on each gate; "" if it has no gates.

    >>> gates_hint("lstm.weight_hh_l0", (32, 8), ["orthogonal(map=cayley)"])
    'lstm.weight_hh_l0: the whole 32×8 matrix, which stacks 4 gates, is made orthogonal; for each gate on its own, \
add `per: {dim: 0, chunks: 4}` to the rule'
    """
    if not name.rpartition(".")[2].startswith("weight_hh") or len(shape) != 2:
        return ""
    gates = next((count for count in _GATES if shape[0] == count * shape[1]), None)
    if gates is None or not any(step.partition("(")[0] in _WHOLE for step in chain):
        return ""
    return (
        f"{name}: the whole {shape[0]}×{shape[1]} matrix, which stacks {gates} gates, is made orthogonal; for each "
        f"gate on its own, add `per: {{dim: 0, chunks: {gates}}}` to the rule"
    )
