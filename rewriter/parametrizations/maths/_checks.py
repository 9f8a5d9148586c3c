"""Requirements on a weight, and the messages for a weight that does not meet them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from rewriter.errors import RewriterError


def require_matrix(name: str, weight: Tensor) -> None:
    """Raise RewriterError unless `weight` has shape ``(..., m, n)``."""
    if weight.ndim < 2:
        raise RewriterError(
            f"{name} acts on matrices, this tensor has shape {list(weight.shape)}; leave biases and other vectors out "
            "with `tensor: weight` in the selector, or `ndim: 2`"
        )


def require_no_kernel(name: str, weight: Tensor, most: int = 3) -> None:
    """Raise RewriterError for the kernel of a convolution: each slice of it would be a matrix.

    Arguments:
        most: the dimensions that are allowed. Three can be a stack of matrices, or the kernel of a Conv1d.
    """
    if weight.ndim > most:
        slices = ", ".join(map(str, weight.shape[-2:]))
        raise RewriterError(
            f"{name} acts on matrices, this tensor has shape {list(weight.shape)}; use `reshape: [out, -1]` for one "
            f"matrix, or `reshape: [-1, {slices}]` for each slice on its own"
        )


def require_square(name: str, weight: Tensor) -> None:
    """Raise RewriterError unless `weight` has shape ``(..., n, n)``."""
    require_matrix(name, weight)
    m, n = weight.shape[-2:]
    if m == n:
        return
    advice = "leave it out with `except`, or use a step for any matrix, such as `orthogonal`"
    if weight.ndim == 2 and m and n and max(m, n) % min(m, n) == 0:
        chunks = f"{{dim: {int(m < n)}, chunks: {max(m, n) // min(m, n)}}}"
        advice = f"use `per: {chunks}` for a chain on each {min(m, n)} x {min(m, n)} block, or " + advice
    raise RewriterError(f"{name} acts on square matrices, this tensor has shape {list(weight.shape)}; {advice}")


def require_real(name: str, weight: Tensor) -> None:
    """Raise RewriterError where `weight` is complex."""
    if weight.is_complex():
        raise RewriterError(f"{name} is defined for real tensors, this one is {weight.dtype}")


REQUIREMENTS: Mapping[str, Callable[[str, Tensor], None]] = {
    "matrix": require_matrix,
    "no vector": require_matrix,
    "square": require_square,
    "real": require_real,
}
"""What a member may ask of its weight, by the word for it."""

OF_MATRICES = frozenset({"matrix", "square"})
"""The words of members that act on the last two dimensions. A plan refuses them for kernels."""


def require_values(name: str, value: Tensor) -> None:
    """Raise NotImplementedError for a meta tensor: it has no values to start a right inverse from."""
    if value.is_meta:
        raise NotImplementedError(f"{name}: a tensor on the meta device has no values to start from")


def require_shape(name: str, value: Tensor, shape: tuple[int, ...] | None) -> None:
    """Raise RewriterError unless `value` has the shape that the parametrization was made for."""
    if shape is not None and tuple(value.shape) != shape:
        raise RewriterError(f"{name} was made for shape {list(shape)}, got {list(value.shape)}")
