"""What the arguments of a root's forward say about how it has to be recorded."""

from __future__ import annotations

import inspect
import itertools
import typing
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from rewriter.capture._bytecode import asked_for_none
from rewriter.errors import CaptureError
from rewriter.sites import plain_class

_EXHAUSTIVE = 3


def check_root(root: nn.Module) -> None:
    """Refuse what torch.fx records without the code that surrounds the forward, or under other names.

    Raises:
        CaptureError: and why.
    """
    kind = plain_class(root)
    for name in ("graph", "code"):
        if name in root._modules or name in root._parameters or name in root._buffers:
            raise CaptureError(f"the model has a submodule or tensor called {name!r}, a name that graphs use")
    if "forward" in vars(root):
        raise CaptureError(f"the forward of this {kind.__name__} was replaced on the object itself")
    if kind.__call__ is not nn.Module.__call__:
        raise CaptureError(f"{kind.__name__} has a __call__ of its own")
    parameters = list(inspect.signature(kind.forward).parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    if inspect.Parameter.VAR_POSITIONAL in kinds and inspect.Parameter.KEYWORD_ONLY in kinds:
        raise CaptureError(f"{kind.__name__}.forward takes *args and keywords after them")
    if inspect.Parameter.VAR_KEYWORD in kinds and hasattr(kind.forward, "__wrapped__"):
        raise CaptureError(f"{kind.__name__}.forward is wrapped by a decorator and takes **kwargs")
    if inspect.Parameter.KEYWORD_ONLY in kinds and hasattr(kind.forward, "__wrapped__"):
        raise CaptureError(f"{kind.__name__}.forward is wrapped by a decorator and takes keyword-only arguments")


def optional_arguments(root: nn.Module) -> list[str]:
    """Return the names of the forward's arguments that may be None."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)
    forward = plain_class(root).forward
    code = getattr(inspect.unwrap(forward), "__code__", None)
    asked = asked_for_none(code) if code is not None else frozenset()

    def may_be_none(parameter: inspect.Parameter) -> bool:
        return parameter.default is None or parameter.name in asked or _admits_none(str(parameter.annotation))

    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return [parameter.name for parameter in parameters if parameter.kind in named and may_be_none(parameter)]


def _admits_none(annotation: str) -> bool:
    return "None" in annotation or "Optional" in annotation


def resolve_annotations(root: nn.Module, graph: fx.Graph) -> None:
    """Make annotations that are still text into types; TorchScript cannot read the text in generated code."""
    try:
        hints = typing.get_type_hints(plain_class(root).forward)
    except Exception:  # names that only a type checker imports: the input has no type then
        hints = {}
    for node in graph.nodes:
        if isinstance(node.type, str):
            node.type = hints.get(str(node.target) if node.op == "placeholder" else "return")


def absences(names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield which of the optional arguments to leave out: all choices of a few, the telling ones of many."""
    if len(names) <= _EXHAUSTIVE:
        choices: Any = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names) + 1))
    else:
        singles = [(name,) for name in names]
        choices = [*singles, *(tuple(n for n in names if n != name) for name in names), tuple(names)]
    for choice in choices:
        yield dict.fromkeys(choice)


def outline(graph: fx.Graph, absent: dict[str, Any]) -> list[Any]:
    """Return what a graph does, with the absent arguments written as None; equal outlines do the same."""
    names: Any = {}
    lines: list[Any] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            names[node] = _Name("None" if name in absent else f"input {name}")
        elif getattr(node.target, "__name__", "") != "_assert_is_none":
            names[node] = _Name(f"%{len(lines)}")
            arguments = fx.node.map_arg((node.args, dict(node.kwargs)), names.__getitem__)
            lines.append((node.op, node.target, repr(arguments)))
    return lines


class _Name:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text
