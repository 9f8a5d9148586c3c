"""A graph's forward that finds its modules in the dictionaries of their parents.

torch.fx writes ``getattr(self.blocks, "3").parametrizations.weight()`` for each node. nn.Module looks each of these
names up in Python. In a network of many small layers that takes up to a tenth of a training step.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any

Path = tuple[str, ...]


def quick(forward: Callable[..., Any], source: str) -> Callable[..., Any]:
    """Return what `forward` does, with the modules looked up in the dictionaries of their parents.

    Each is looked up where it is used: a hook may replace it while the forward runs. Where a name is in no dictionary
    at the start, as when a module was put into another that passes on attributes, `forward` itself runs.

    Arguments:
        forward: the function that torch.fx made.
        source: its code.
    """
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    modules = _Modules()
    function.body = [modules.visit(statement) for statement in function.body]
    if not modules.paths:
        return forward
    made: dict[str, Any] = {}
    tree = ast.fix_missing_locations(ast.Module([function, *modules.look_up()], []))
    exec(compile(tree, forward.__code__.co_filename, "exec", dont_inherit=True), forward.__globals__, made)
    fast, look_up = made[function.name], made[_LOOK_UP]

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            look_up(self)
        except KeyError:
            return forward(self, *args, **kwargs)
        return fast(self, *args, **kwargs)

    return run


_LOOK_UP = "reparam_look_up"


class _Modules(ast.NodeTransformer):
    """Replaces the modules that an expression names by entries of dictionaries, and says what these are."""

    def __init__(self) -> None:
        self.paths: set[Path] = set()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        path = _path(node.func)
        if path is None:
            return self.generic_visit(node)
        node.args = [self.visit(argument) for argument in node.args]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        node.func = self._module(path)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        path = _path(node)
        if path is None:
            return self.generic_visit(node)
        node.value = self._module(path[:-1])
        return node

    def _module(self, path: Path) -> ast.expr:
        if path:
            self.paths.add(path)
        return ast.parse(_entry(path), mode="eval").body

    def look_up(self) -> list[ast.stmt]:
        """Return the definition of a function that looks all of them up."""
        parents = {path[:length] for path in self.paths for length in range(1, len(path))}
        body = [f"    {_entry(path)}" for path in sorted(self.paths - parents)]
        return ast.parse("\n".join([f"def {_LOOK_UP}(self):", *body])).body


def _entry(path: Path) -> str:
    return "self" + "".join(f"._modules[{name!r}]" for name in path)


def _path(node: ast.expr) -> Path | None:
    """Return the names by which an expression goes from ``self`` to what it stands for, if it does so."""
    if isinstance(node, ast.Name):
        return () if node.id == "self" else None
    if isinstance(node, ast.Attribute):
        inner, name = node.value, node.attr
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        inner, last = node.args
        if not (isinstance(last, ast.Constant) and isinstance(last.value, str)):
            return None
        name = last.value
    else:
        return None
    found = _path(inner)
    return None if found is None else (*found, name)
