"""Private names of torch stand in one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rewriter
from rewriter import _torch

PACKAGE = Path(rewriter.__file__).parent


def private_names(tree: ast.Module) -> Iterator[str]:
    """Yield each dotted name below torch that has a part with a leading underscore."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def is_private(name: str) -> bool:
    first, *others = name.partition("(")[0].split(".")
    return first == "torch" and any(part.startswith("_") and not part.endswith("__") for part in others)


def test_one_file_takes_private_names_from_torch() -> None:
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if (names := [*filter(is_private, private_names(ast.parse(path.read_text())))])
    }
    assert found.pop("_torch.py")
    assert found.pop("export/_read_back.py")  # runs in a process of its own, without the package
    assert not found, "move these to rewriter/_torch.py, with the reason"


def test_the_names_exist_in_this_torch() -> None:
    assert not [name for name in _torch.__all__ if getattr(_torch, name, None) is None]


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("from torch._ops import OpOverload", True),
        ("from torch.fx.graph import _PyTreeInfo", True),
        ("import torch._dynamo", True),
        ("torch._C._get_tracing_state()", True),
        ("torch.__future__.get_swap_module_params_on_conversion()", False),
        ("from torch.fx import Graph", False),
        ("module._parameters", False),
    ],
)
def test_what_counts_as_private(text: str, private: bool) -> None:
    assert any(map(is_private, private_names(ast.parse(text)))) == private
