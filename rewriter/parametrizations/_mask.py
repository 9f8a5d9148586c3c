"""Fixed masks: some entries of a tensor are kept, the others are zero."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewriter._given import kind_of
from rewriter.errors import RewriterError
from rewriter.parametrizations._base import Parametrization
from rewriter.parametrizations._registry import suggestion


class FixedMask(Parametrization):
    """Multiply by a mask that is chosen once: forward, right inverse and merging, for all ways to choose it.

    Arguments:
        chosen_mask: the mask, if `plan_sites` has chosen it over all sites or after earlier masks of the chain.
    """

    guarantee = "entries outside of the mask are exactly zero"
    cost = "one multiplication per entry"
    wide_buffers = False
    masks = True
    """Its right inverse is the identity, and `plan_sites` sees the masks of adjacent earlier steps."""
    plans_alone: ClassVar[bool] = False
    """Whether `plan_sites` is needed without other masks beside this one."""
    one_by_one: ClassVar[bool] = True
    """Whether `plan_sites` decides on each tensor without the others."""

    chosen_mask: Tensor | None = None

    def build(self, weight: Tensor | None) -> None:
        mask = self.chosen_mask
        if mask is None:
            assert weight is not None
            mask = self.choose(weight, None, self)
        for field in self.fields:
            value = getattr(self, field)
            if value is None or isinstance(value, (Tensor, Mapping)):  # the buffer below has all of them
                delattr(self, field)
        self.register_buffer("mask", as_mask(mask, weight))
        self.mask: Tensor

    @classmethod
    def choose(cls, weight: Tensor, remaining: Tensor | None, given: Any) -> Tensor:
        """Return the mask for `weight`.

        Arguments:
            weight: the tensor to prune.
            remaining: the product of earlier masks in the chain, or ``None`` without any.
            given: has the constructor's arguments as attributes.
        """
        raise NotImplementedError

    @classmethod
    def plan_sites(
        cls,
        weights: Sequence[Tensor],
        names: Sequence[str] = (),
        remaining: Sequence[Tensor | None] = (),
        **arguments: Any,
    ) -> list[dict[str, Any]]:
        """Return the mask of each of a rule's tensors.

        Arguments:
            weights: the tensors.
            names: their names in the model.
            remaining: for each, the product of earlier masks in the chain.
            arguments: those of the constructor.
        """
        given, earlier = cls.given(**arguments), remaining or [None] * len(weights)
        return [
            {} if weight.is_meta else {"chosen_mask": as_mask(cls.choose(weight, left, given), weight)}
            for weight, left in zip(weights, earlier, strict=True)
        ]

    @classmethod
    def given(cls, **arguments: Any) -> Any:
        """Return an object that has all the constructor's arguments as attributes."""
        bound = inspect.Signature(list(cls.fields.values())).bind(**arguments)
        bound.apply_defaults()
        return SimpleNamespace(**bound.arguments)

    def forward(self, X: Tensor) -> Tensor:
        return X * self.mask

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def fuse(self, next: nn.Module) -> nn.Module | None:
        """Return the product of both masks if `next` is a mask."""
        return Mask(self.mask * next.mask) if isinstance(next, FixedMask) else None

    def extra_repr(self) -> str:
        shape = "x".join(str(n) for n in self.mask.shape)
        if self.mask.is_meta:
            return shape
        return f"{shape}, {self.mask.count_nonzero().item()} of {self.mask.numel()} kept"


class Mask(FixedMask, name="mask"):
    """Keep the entries where a fixed mask is one and make all others zero.

    >>> import torch
    >>> kept = torch.tensor([[True, False], [True, True]])
    >>> Mask(kept)(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[1., 0.],
            [3., 4.]])

    Two masks in a row are one mask: their product. The right inverse returns the tensor unchanged, so that undoing
    the chain restores the pruned entries.

    Arguments:
        mask: from Python, the mask itself: a bool or 0/1 tensor that broadcasts to the weight. Other numbers
            are factors, as for ``torch.nn.utils.prune.custom_from_mask``.
        file: from a spec, a ``.pt``, ``.safetensors`` or ``.npy`` file that has the mask.
        key: its name in `file`, if the file has several. Without it, the name of the tensor in the model
            (``fc.weight``, or ``fc.weight_mask`` as in pruned state dicts).
    """

    reference = "torch.nn.utils.prune.custom_from_mask"
    path_arguments = ("file",)
    plans_alone = True

    mask: Tensor | None = None  # type: ignore[assignment]
    file: str | None = None
    key: str | None = None

    def build(self, weight: Tensor | None) -> None:
        if self.chosen_mask is None:
            self.chosen_mask = self.choose(weight, None, self)
        super().build(weight)

    @classmethod
    def choose(cls, weight: Any, remaining: Tensor | None, given: Any) -> Tensor:
        if (given.mask is None) == (given.file is None):
            raise RewriterError("a mask is either a tensor (from Python) or a `file` (and `key`): give one")
        mask: Tensor | None = given.mask
        return _pick(read_tensors(given.file), given.key, given.file) if mask is None else mask

    @classmethod
    def plan_sites(
        cls,
        weights: Sequence[Tensor],
        names: Sequence[str] = (),
        remaining: Sequence[Tensor | None] = (),
        **arguments: Any,
    ) -> list[dict[str, Any]]:
        """Return the mask of each site: from a file, the one with the tensor's own name in the model if it is there."""
        given = cls.given(**arguments)
        stored = read_tensors(given.file) if given.file is not None and given.key is None and names else {}
        planned = []
        for weight, name in zip(weights, names or [""] * len(weights), strict=True):
            own = [k for k in (name, f"{name}_mask") if k in stored]
            mask = stored[own[0]] if own else cls.choose(weight, None, given)
            planned.append({"chosen_mask": as_mask(mask, weight)})
        return planned


def as_mask(mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return `mask` as a new bool tensor, or in the weight's dtype if it has other factors than 0 and 1.

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
    """Return the tensors of a ``.pt``, ``.safetensors`` or ``.npy`` file by name, a single one as ``""``.

    No code of the file runs.

    Raises:
        RewriterError: there is no such file, it is of another kind, or has no tensors.
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
        raise RewriterError(f"{file!r} contains {kind_of(stored)}, not a tensor or a dict of tensors")
    return {str(name): tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}


def _pick(stored: Mapping[str, Tensor], key: str | None, file: str) -> Tensor:
    if key is None and len(stored) == 1:
        return next(iter(stored.values()))
    if key is None:
        known = ", ".join(stored)
        raise RewriterError(f"{file!r} has {len(stored)} tensors: choose one with `key` ({known})")
    if key not in stored:
        raise RewriterError(f"{file!r} has no tensor {key!r}" + suggestion(key, stored))
    return stored[key]


def _broadcasts(small: torch.Size, large: torch.Size) -> bool:
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(a in (1, b) for a, b in pairs)
