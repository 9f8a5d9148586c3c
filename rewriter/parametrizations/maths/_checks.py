"""What a family says about a weight that it does not fit."""

from __future__ import annotations

from torch import Tensor

from rewriter.errors import RewriterError


def require_matrix(name: str, weight: Tensor) -> None:
    """Raise RewriterError unless `weight` has shape ``(..., m, n)``."""
    if weight.ndim < 2:
        raise RewriterError(
            f"{name} acts on matrices (or batches of them), this tensor has shape {list(weight.shape)}; "
            "use `reshape: [out, -1]` to let the chain see a matrix"
        )


def require_values(name: str, value: Tensor) -> None:
    """Raise NotImplementedError for a meta tensor: it has no values that a right inverse could look at."""
    if value.is_meta:
        raise NotImplementedError(f"{name}: a tensor on the meta device has no values to start from")


def require_square(name: str, weight: Tensor) -> None:
    """Raise RewriterError unless `weight` has shape ``(..., n, n)``."""
    require_matrix(name, weight)
    if weight.size(-1) != weight.size(-2):
        raise RewriterError(f"{name} acts on square matrices, this tensor has shape {list(weight.shape)}")


def require_real(name: str, weight: Tensor) -> None:
    """Raise RewriterError where `weight` is complex."""
    if weight.is_complex():
        raise RewriterError(f"{name} is defined for real tensors, this one is {weight.dtype}")


def require_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Raise RewriterError unless `value` has the shape that the parametrization was made for."""
    if tuple(value.shape) != shape:
        raise RewriterError(f"{name} was made for shape {list(shape)}, got {list(value.shape)}")
