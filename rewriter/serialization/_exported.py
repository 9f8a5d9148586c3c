"""Reading a ``.pt2`` file: what torch.export.load would evaluate or unpickle is vetted first."""

from __future__ import annotations

import ast
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from rewriter.errors import ModelFileError
from rewriter.serialization._functions import function_named
from rewriter.serialization._inspect import names_in_pickle
from rewriter.serialization._names import is_listed, needs_no_leave

_SYMBOL = re.compile(r"(?!.*__)[A-Za-z]\w*", re.ASCII)
_FUNCTIONS = frozenset(
    """
    Add And CeilToInt CleanDiv Eq FloatTrueDiv FloorDiv FloorToInt Ge Gt IntTrueDiv Integer Le Lt Max Min Mod
    ModularIndexing Mul Ne Not Or Pow PowByNatural PythonMod RoundToInt ToFloat TruncToInt Where
    """.split()
)
_NAMES = frozenset({"int_oo", "oo"})
_SIZES = frozenset({"dim", "size", "storage_offset", "stride"})
_ARITHMETIC = (
    *(ast.Expression, ast.Load, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop),
    *(ast.boolop, ast.cmpop),
)


def load_exported(path: Path, *, allow: tuple[str, ...] = (), trust: bool = False) -> ExportedProgram:
    """Read an ExportedProgram.

    torch.export.load unpickles, evaluates size expressions as Python and calls what its graph names; so each
    of these is looked at before, and the file is refused if one of them is more than data about tensors.

    Raises:
        ModelFileError: the file is damaged, or asks for names that are not allowed.
    """
    try:
        refused = [] if trust else sorted({name for name in _asked_for(path) if not is_listed(name, allow)})
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, RecursionError) as problem:
        raise ModelFileError(f"{path} is damaged: {problem}") from problem
    if refused:
        names = "\n".join(f"  {name}" for name in refused)
        raise ModelFileError(
            f"{path} asks for more than torch's tensor functions:\n{names}\n"
            "If you know where the file comes from, trust it: --trust (it may then run any code)."
        )
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            return torch.export.load(file)
    except Exception as problem:
        text = str(problem).partition("\n")[0] or type(problem).__name__
        raise ModelFileError(f"{path} cannot be read as an ExportedProgram: {text}") from problem


def _asked_for(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            content = archive.read(entry)
            if entry.filename.endswith(".json"):
                yield from _asked_in_json(json.loads(content))
            elif content.startswith(b"PK\x03\x04"):
                yield from _asked_in_pickle(content, entry.filename)
            elif content.startswith(b"\x80") and "/weights/" not in entry.filename:
                yield f"a pickled object ({entry.filename})"


def _asked_in_pickle(content: bytes, name: str) -> Iterator[str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl"):
                names = names_in_pickle(io.BytesIO(archive.read(entry)))
                yield from (asked for asked in names if not needs_no_leave(asked))
    try:
        # torch.export.load falls back to an unrestricted read where this one fails.
        torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception:
        yield f"a pickled object ({name})"


def _asked_in_json(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "target" and isinstance(item, str) and not _is_known_target(item):
                yield item
            elif key in ("expr_str", "guards_code"):
                texts = item if isinstance(item, list) else [item]
                yield from (f"the size expression {text!r}" for text in texts if not _is_arithmetic(text))
            elif key == "__enum__":
                yield "an imported enumeration"
            yield from _asked_in_json(item)
    elif isinstance(value, list):
        for item in value:
            yield from _asked_in_json(item)
    elif isinstance(value, str) and value.lstrip()[:1] in "[{" and "__enum__" in value:
        yield "an imported enumeration"


def _is_known_target(target: str) -> bool:
    if target.startswith("_operator."):
        target = target[1:]
    elif not target.startswith(("torch.", "math.", "#")):
        # torch.export.load leaves such a target as the text it is.
        return True
    elif re.fullmatch(r"torch\.ops\.higher_order\.\w+", target, re.ASCII):
        return True
    try:
        function_named(target)
    except ModelFileError:
        return False
    return True


def _is_arithmetic(text: Any) -> bool:
    # torch.export.load hands these to sympify, which evaluates Python; `module()` compiles the guards.
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, TypeError, ValueError):
        return False
    return _is_size(tree)


def _is_symbol(call: ast.Call) -> bool:
    texts = [node.value for node in call.args if isinstance(node, ast.Constant)]
    assumed = all(isinstance(keyword.value, ast.Constant) for keyword in call.keywords)
    named = len(call.args) == 1 and len(texts) == 1 and isinstance(texts[0], str)
    return assumed and named and _SYMBOL.fullmatch(str(texts[0])) is not None


def _is_size(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _NAMES or re.fullmatch(r"[a-z]{1,2}\d+|L", node.id, re.ASCII) is not None
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == "Symbol":
            return _is_symbol(node)
        called = node.func
        if isinstance(called, ast.Attribute):
            known = called.attr in _SIZES and _is_size(called.value)
        else:
            known = isinstance(called, ast.Name) and called.id in _FUNCTIONS
        return known and not node.keywords and all(map(_is_size, node.args))
    if isinstance(node, ast.Constant):
        # A text would be evaluated in its turn.
        return isinstance(node.value, (bool, int, float))
    if isinstance(node, ast.Subscript):
        key = node.slice
        named = isinstance(key, ast.Constant) and isinstance(node.value, ast.Name) and node.value.id == "L"
        return _is_size(node.value) and (named or _is_size(key))
    return isinstance(node, _ARITHMETIC) and all(map(_is_size, ast.iter_child_nodes(node)))
