"""A graph's forward that finds each of its modules once, ahead of all else.

torch.fx writes ``getattr(self.blocks, "3").parametrizations.weight()`` for each node. nn.Module looks each of these
names up in Python. In a network of many small layers that takes up to a tenth of a training step.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

Path = tuple[str, ...]


def quick(forward: Callable[..., Any], source: str) -> Callable[..., Any]:
    """Return what `forward` does, with the modules looked up in the dictionaries of their parents.

    Where a name is in none of these, as when a module was put into another that passes on attributes, all of them are
    looked up as `forward` does.

    Arguments:
        forward: the function that torch.fx made.
        source: its code.
    """
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    modules = _Modules()
    function.body = [modules.visit(statement) for statement in function.body]
    if not modules.names:
        return forward
    function.body.insert(0, modules.look_up())
    made: dict[str, Any] = {}
    tree = ast.fix_missing_locations(ast.Module([function], []))
    exec(compile(tree, forward.__code__.co_filename, "exec", dont_inherit=True), forward.__globals__, made)
    found: Callable[..., Any] = made[function.name]
    return found


class _Modules(ast.NodeTransformer):
    """Replaces the modules that an expression names by local variables, and says what these are."""

    def __init__(self) -> None:
        self.names: dict[Path, str] = {}

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

    def _module(self, path: Path) -> ast.Name:
        if not path:
            return ast.Name("self", ast.Load())
        if path not in self.names:
            self._module(path[:-1])
            self.names[path] = f"reparam_module_{len(self.names)}"
        return ast.Name(self.names[path], ast.Load())

    def look_up(self) -> ast.stmt:
        """Return the statement that assigns the variables."""
        fast, slow = [], []
        for path, name in self.names.items():
            parent = self.names[path[:-1]] if path[:-1] else "self"
            fast.append(f"    {name} = {parent}._modules[{path[-1]!r}]")
            slow.append(f"    {name} = getattr({parent}, {path[-1]!r})")
        return ast.parse("\n".join(["try:", *fast, "except KeyError:", *slow])).body[0]


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
