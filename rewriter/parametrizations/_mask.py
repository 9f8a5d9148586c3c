"""Fixed masks: some entries of a tensor are kept, the others are zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter._given import kind_of
from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import register, suggestion


class FixedMask(nn.Module):
    """Multiply by a mask chosen once: forward, right inverse and merging, for all ways to choose it.

    Arguments:
        mask: bool, 0/1 or factors; broadcasts to the weight.
        weight: gives the shape to fit, the device, and the dtype of factors.
    """

    guarantee = "entries outside of the mask are exactly zero"
    cost = "one multiplication per entry"

    def __init__(self, mask: Tensor, weight: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", as_mask(mask, weight))
        self.mask: Tensor

    def forward(self, X: Tensor) -> Tensor:
        return X * self.mask

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def fuse(self, next: nn.Module) -> nn.Module | None:
        """Return the product of both masks where `next` is a mask too."""
        return Mask(self.mask * next.mask) if isinstance(next, FixedMask) else None

    def extra_repr(self) -> str:
        shape = "x".join(str(n) for n in self.mask.shape)
        if self.mask.is_meta:
            return shape
        return f"{shape}, {self.mask.count_nonzero().item()} of {self.mask.numel()} kept"


@register("mask")
class Mask(FixedMask):
    """Keep the entries where a fixed mask is one and make all others zero.

    >>> import torch
    >>> kept = torch.tensor([[True, False], [True, True]])
    >>> Mask(kept)(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[1., 0.],
            [3., 4.]])

    Two masks in a row are one mask: their product. The right inverse leaves a tensor as it is, so that
    undoing the chain gives the pruned entries back.

    Arguments:
        mask: from Python, the mask itself: a bool or 0/1 tensor that broadcasts to the weight. Other numbers
            are taken as factors, as ``torch.nn.utils.prune.custom_from_mask`` does.
        file: from a spec, a ``.pt``, ``.safetensors`` or ``.npy`` file that holds it.
        key: its name in `file`, where the file holds several. Without it, the name of the tensor in the model
            (``fc.weight``, or ``fc.weight_mask`` as pruned state dicts have it).
        weight: the tensor to be masked, filled in by the site; gives the device, and the dtype of factors.

    Raises:
        RewriterError: the file cannot be read, has no such key, or its mask does not fit the weight.
    """

    reference = "torch.nn.utils.prune.custom_from_mask"
    path_arguments = ("file",)

    def __init__(
        self,
        mask: Tensor | None = None,
        file: str | None = None,
        key: str | None = None,
        *,
        weight: Tensor | None = None,
    ) -> None:
        if (mask is None) == (file is None):
            raise RewriterError("a mask is either a tensor (from Python) or a `file` (and `key`): give one")
        if mask is None:
            mask = _pick(read_tensors(str(file)), key, str(file))
        super().__init__(mask, weight)

    @classmethod
    def plan_sites(
        cls,
        weights: Sequence[Tensor],
        names: Sequence[str] = (),
        mask: Tensor | None = None,
        file: str | None = None,
        key: str | None = None,
    ) -> list[dict[str, Any]]:
        """Return the key of each site's mask: the tensor's own name in the model, where the file has it."""
        if file is None or key is not None or not names:
            return [{} for _ in weights]
        stored = read_tensors(file)
        found = [[k for k in (name, f"{name}_mask") if k in stored] for name in names]
        return [{"key": keys[0]} if keys else {} for keys in found]


def as_mask(mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return `mask` as a new bool tensor, or in the weight's dtype where it holds other factors than 0 and 1.

    Raises:
        RewriterError: it does not broadcast to the shape of `weight`.
    """
    mask = mask.detach()
    if weight is not None:
        if not _broadcasts(mask.shape, weight.shape):
            raise RewriterError(
                f"a mask of shape {list(mask.shape)} does not fit a weight of shape {list(weight.shape)}"
            )
        mask = mask.to(weight.device)[(None,) * (weight.dim() - mask.dim())]
    kept = mask != 0
    if mask.is_meta or torch.equal(kept.to(mask.dtype), mask):
        return kept
    return mask.to(weight.dtype, copy=True) if weight is not None else mask.clone()


def read_tensors(file: str) -> Mapping[str, Tensor]:
    """Return the tensors of a ``.pt``, ``.safetensors`` or ``.npy`` file by name, a lone one as ``""``.

    Nothing in the file is executed.

    Raises:
        RewriterError: there is no such file, it is of another kind, or holds no tensors.
    """
    path = Path(file)
    if not path.is_file():
        raise RewriterError(f"there is no mask file {file!r}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npy":
        import numpy

        return {"": torch.from_numpy(numpy.load(path, allow_pickle=False))}
    if path.suffix not in {".pt", ".pth"}:
        raise RewriterError(f"a mask file ends in .pt, .safetensors or .npy, not {path.suffix!r}: {file!r}")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(stored, Tensor):
        return {"": stored}
    if not isinstance(stored, Mapping):
        raise RewriterError(f"{file!r} holds {kind_of(stored)}, not a tensor or a dict of tensors")
    return {str(name): tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}


def _pick(stored: Mapping[str, Tensor], key: str | None, file: str) -> Tensor:
    if key is None and len(stored) == 1:
        return next(iter(stored.values()))
    if key is None:
        known = ", ".join(stored)
        raise RewriterError(f"{file!r} holds {len(stored)} tensors: say which one with `key` ({known})")
    if key not in stored:
        raise RewriterError(f"{file!r} has no tensor {key!r}" + suggestion(key, stored))
    return stored[key]


def _broadcasts(small: torch.Size, large: torch.Size) -> bool:
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(a in (1, b) for a, b in pairs)
