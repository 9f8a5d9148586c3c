"""State dicts from one form to another, without a change of the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from rewriter._given import check_model, kind_of
from rewriter._rewrite import rewrite
from rewriter.errors import RewriterError
from rewriter.parametrizations._orthogonal import Orthogonal
from rewriter.parametrizations.maths._householder import frame
from rewriter.planning import Plan, survey
from rewriter.serialization._safetensors import KEY
from rewriter.sites._identity import note_identity
from rewriter.sites._translation import Place, Translation

Form = Literal["plain", "rewritten", "torch"]


def convert_state_dict(state: Mapping[str, Any], model: nn.Module | Plan, to: Form) -> OrderedDict[str, Any]:
    """Return a state dict with the keys and values of another form of the same model.

    >>> import torch, rewriter
    >>> spec = {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}
    >>> model = rewriter.rewrite(torch.nn.Sequential(torch.nn.Linear(3, 3)), spec)
    >>> list(convert_state_dict(model.state_dict(), model, to="plain"))
    ['0.weight', '0.bias']

    The state may have any form that `load_state_dict` of a rewritten model takes. Values are evaluated in evaluation
    mode, in the precision of the state. Neither the model nor the state changes.

    Arguments:
        state: the state dict.
        model: a rewritten model, one that contains rewritten models, or the plan of one, which is executed on a copy
            of its model. Its chains are used, and its tensors where a chain reads one that the state lacks.
        to: ``"plain"`` for the model before it was rewritten, or baked. ``"rewritten"`` for the rewritten model.
            ``"torch"`` for the same keys without the names of the chains, as torch's own parametrizations save them.

    Raises:
        RewriterError: a tensor cannot be converted, or the state was saved from other chains; names each tensor.
    """
    if isinstance(model, Plan):
        return convert_state_dict(state, rewrite(model.model, model), to=to)
    check_model(model, "convert_state_dict", programs=False)
    if to not in ("plain", "rewritten", "torch"):
        raise RewriterError(f"to is 'plain', 'rewritten' or 'torch', not {to!r}")
    if not isinstance(state, Mapping):
        raise RewriterError(f"convert_state_dict takes a state dict first, not {kind_of(state)}")
    translation = Translation(model, state, assign=True)
    if not translation.places:
        raise RewriterError(
            f"no tensor of {type(model).__name__} is computed by a chain: give convert_state_dict the rewritten model, "
            "rewrite(model, spec)"
        )
    translation.check_identity()
    if to == "plain":
        names = [name for entry in survey(model) for name in entry.names]
        return _ordered(translation.to_plain(), names)
    converted = _ordered(translation.to_rewritten(), model.state_dict())
    for place in translation.places:
        metadata = converted._metadata.setdefault(place.prefix[:-1], {})  # type: ignore[attr-defined]
        metadata.pop(KEY, None)
        if to == "rewritten":
            note_identity(place.site.spec, converted, place.prefix)
        else:
            _with_square_bases(place, converted)
    return converted


def _with_square_bases(place: Place, state: OrderedDict[str, Any]) -> None:
    """Replace bases that `orthogonal` stores as reflections by the square ones that torch stores."""
    for path, step in place.site.named_modules():
        key = f"{place.prefix}{path}.base"
        if isinstance(step, Orthogonal) and key in state and state[key].size(-1) != state[key].size(-2):
            state[key] = frame(state[key])


def _ordered(state: OrderedDict[str, Any], names: Iterable[str]) -> OrderedDict[str, Any]:
    """Sort a state dict as the model lists its tensors; other keys come last."""
    known = dict.fromkeys(names)
    for name in [*known, *(key for key in state if key not in known)]:
        if name in state:
            state.move_to_end(name)
    return state
