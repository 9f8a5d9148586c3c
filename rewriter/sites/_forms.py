"""Forms in which other tools save a computed tensor, and the values that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Found:
    """A tensor that a state dict holds in another form than the site's.

    Arguments:
        keys: the keys that hold it.
        value: the tensor.
        originals: the stored tensors of the form; none for a plain value.
        buffers: its other tensors, by the name that a step has for them.
    less_likely: other values, where the form is ambiguous; a chain that is the form's own knows which it is.
    """

    keys: tuple[str, ...]
    value: Any
    originals: tuple[Tensor, ...] = ()
    buffers: Mapping[str, Tensor] | None = None
    less_likely: tuple[Tensor, ...] = ()


def find_form(state: Mapping[str, Any], name: str, others: Container[str] = ()) -> Found | None:
    """Return the tensor called `name` from a state dict that holds it as a plain value or in an old form.

    Arguments:
        state: the state dict.
        name: the key of the plain value.
        others: keys of other tensors of the model, which belong to no form of this one.
    """
    for suffixes, build in _FORMS.items():
        keys = tuple(name + suffix for suffix in suffixes)
        if all(isinstance(state.get(key), Tensor) and key not in others for key in keys):
            return build(keys, *(state[key] for key in keys))
    return Found((name,), state[name]) if name in state else None


def _weight_norm(keys: tuple[str, ...], g: Tensor, v: Tensor) -> Found:
    """``torch.nn.utils.weight_norm``: the norms are of the slices along the dimensions in which g has more than one."""
    others = [dim for dim in range(v.ndim) if g.ndim != v.ndim or g.shape[dim] == 1]
    norms = torch.linalg.vector_norm(v, dim=others, keepdim=g.ndim == v.ndim) if others else v.abs()
    return Found(keys, v * (g / norms), (g, v))


def _spectral_norm(keys: tuple[str, ...], weight: Tensor, u: Tensor, v: Tensor) -> Found:
    """``torch.nn.utils.spectral_norm``: the value in evaluation mode.

    The state does not name the dimension of the outputs. It is the one whose matrix maps v nearest to the direction of
    u, among those whose sizes fit: the power method ended there.
    """
    matrices = [weight.movedim(dim, 0).flatten(1) for dim in range(weight.ndim)]
    fitting = [matrix for matrix in matrices if matrix.shape == (len(u), len(v))]
    if not fitting:
        return Found(keys, weight, (weight,))
    fitting.sort(key=lambda matrix: -float(torch.cosine_similarity(u, torch.mv(matrix, v), dim=0).abs()))
    values = [weight / torch.dot(u, torch.mv(matrix, v)) for matrix in fitting]
    return Found(keys, values[0], (weight,), {"_u": u, "_v": v}, tuple(values[1:]))


def _pruned(keys: tuple[str, ...], weight: Tensor, mask: Tensor) -> Found:
    """``torch.nn.utils.prune``."""
    return Found(keys, weight * mask, (weight,), {"mask": mask})


_FORMS: dict[tuple[str, ...], Callable[..., Found]] = {
    ("_g", "_v"): _weight_norm,
    ("_orig", "_u", "_v"): _spectral_norm,
    ("_orig", "_mask"): _pruned,
}
