"""Example inputs, from text such as ``float32[2,3,8]``."""

from __future__ import annotations

import re

import torch

from rewriter.errors import RewriterError

_EXAMPLE = re.compile(r"\s*(?:torch\.)?([a-z]+[0-9]*)\s*\[\s*((?:\d+\s*(?:,\s*\d+\s*)*)?)\]\s*")


def example_tensor(text: str) -> torch.Tensor:
    """Return a tensor of the dtype and shape that `text` names: normal numbers; zeros for integers.

    >>> example_tensor("int64[2, 5]").shape, example_tensor("float32[]").dtype
    (torch.Size([2, 5]), torch.float32)

    Raises:
        RewriterError: `text` is not of the form ``dtype[size,size,…]``.
    """
    match = _EXAMPLE.fullmatch(text)
    dtype = getattr(torch, match[1], None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise RewriterError(f"an example input is given as dtype[size,…] such as float32[2,3,8], not {text!r}")
    try:
        shape = [int(size) for size in match[2].split(",") if size.strip()]
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return torch.zeros(shape, dtype=dtype)
    except (RuntimeError, ValueError, TypeError, OverflowError) as problem:
        reason = str(problem).partition("\n")[0]
        raise RewriterError(f"no example input can be made of {text!r}: {reason}") from problem
