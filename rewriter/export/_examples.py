"""Example inputs: from text such as ``float32[2,3,8]``, or from a file."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter._given import kind_of
from rewriter.capture import Call
from rewriter.errors import ModelFileError, RewriterError

_EXAMPLE = re.compile(
    r"\s*(?:torch\.)?([a-z]+[0-9]*)\s*\[\s*((?:\d+\s*(?:,\s*\d+\s*)*)?)\]\s*(?::\s*(-?\d+)\s*\.\.\s*(-?\d+)\s*)?"
)
_FORM = "dtype[size,…] such as float32[2,3,8], for integers also int64[2,16]:0..30521"


def example_tensor(text: str) -> Tensor:
    """Return a tensor of the dtype and shape that `text` names, with the same random numbers each time.

    Floating-point numbers are normal. Integers are drawn from the range after the colon, both ends included. Without a
    range they are 0 or 1, and each row starts with a 1, so that an attention mask leaves something to attend to.

    >>> example_tensor("int64[2, 5]:3..3").tolist(), example_tensor("float32[]").dtype
    ([[3, 3, 3, 3, 3], [3, 3, 3, 3, 3]], torch.float32)

    Raises:
        RewriterError: `text` is not of the form ``dtype[size,size,…]`` or ``dtype[size,…]:low..high``.
    """
    match = _EXAMPLE.fullmatch(text)
    dtype = getattr(torch, match[1], None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise RewriterError(f"an example input is given as {_FORM}, not {text!r}")
    try:
        shape = [int(size) for size in match[2].split(",") if size.strip()]
        generator = torch.Generator().manual_seed(0)
        if dtype.is_floating_point or dtype.is_complex:
            if match[3]:
                raise ValueError("a range is for integers")
            return torch.randn(shape, generator=generator).to(dtype)
        low, high = (int(match[3]), int(match[4])) if match[3] else (0, 1)
        if low > high:
            raise ValueError(f"the range {low}..{high} is empty")
        drawn = torch.randint(low, high + 1, shape, generator=generator)
        if not match[3] and shape:
            drawn[..., :1] = 1
        made = drawn.to(dtype)
        if not torch.equal(made.to(drawn.dtype), drawn):
            raise ValueError(f"{match[1]} cannot hold all of {low}..{high}")
        return made
    except (RuntimeError, ValueError, TypeError, OverflowError) as problem:
        reason = str(problem).partition("\n")[0]
        raise RewriterError(f"no example input can be made of {text!r}: {reason}") from problem


def example_call(texts: Sequence[str]) -> Call:
    """Return the call that some texts name: positional arguments, then ``name=dtype[size,…]``.

    >>> call = example_call(["float32[2,3]", "mask=bool[2]"])
    >>> [list(value.shape) for value in call.args], list(call.kwargs)
    ([[2, 3]], ['mask'])
    """
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if equals and name.strip().isidentifier():
            if name.strip() in kwargs:
                raise RewriterError(f"the example input {name.strip()} is given twice")
            kwargs[name.strip()] = example_tensor(rest)
        elif kwargs:
            raise RewriterError(f"the example input {text!r} comes after one with a name: put it first, or name it")
        else:
            args.append(example_tensor(text))
    return Call(tuple(args), kwargs)


def call_from_file(path: str | os.PathLike[str]) -> Call:
    """Read a call that torch.save wrote; reading it runs no code of the file.

    The file has a tensor, a list or tuple of the positional arguments, a dict of the arguments by name, or the dict
    ``{"args": …, "kwargs": …}``.

    Raises:
        ModelFileError: the file cannot be read, or has something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise ModelFileError(
            f"{path} has classes of its own; example inputs are a tensor, a list or a dict of tensors, from torch.save"
        ) from problem
    except Exception as problem:
        reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        raise ModelFileError(f"the example inputs in {path} cannot be read: {reason}") from problem
    return call_of(content, str(path))


def call_of(content: Any, where: str) -> Call:
    """Return the call that a value means; see `call_from_file`."""
    if isinstance(content, Mapping) and content and set(content) <= {"args", "kwargs"}:
        args, kwargs = content.get("args", ()), content.get("kwargs", {})
        args = (args,) if isinstance(args, Tensor) else args
        if isinstance(args, (list, tuple)) and isinstance(kwargs, Mapping):
            return Call(tuple(args), dict(kwargs))
    elif isinstance(content, Tensor):
        return Call((content,))
    elif isinstance(content, (list, tuple)):
        return Call(tuple(content))
    elif isinstance(content, Mapping) and content and all(isinstance(name, str) for name in content):
        return Call((), dict(content))
    raise ModelFileError(
        f"{where} has {kind_of(content)}: example inputs are a tensor, a list of arguments, a dict of arguments by "
        "name, or {'args': …, 'kwargs': …}"
    )
