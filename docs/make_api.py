"""Write docs/api.md, the reference of the public Python API, from the docstrings: ``python docs/make_api.py``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import rewriter

PAGE = Path(__file__).parent / "api.md"
HEAD = """# Python API

`python docs/make_api.py` writes this page from the docstrings. `import rewriter` makes everything on it reachable.
"""
SECTIONS = ("Arguments", "Returns", "Raises")


def page() -> str:
    """Return the text of the page."""
    modules: list[ModuleType] = [rewriter, rewriter.state, rewriter.io, rewriter.export, rewriter.testing]
    parts = [HEAD]
    for module in modules:
        summary = (module.__doc__ or "").partition("\n")[0] if module is not rewriter else "The verbs and the values."
        parts.append(f"## {module.__name__}\n\n{_inline(summary)}\n")
        parts += [_entry(module, name) for name in module.__all__]
    return "\n".join(parts)


def _entry(module: ModuleType, name: str) -> str:
    found: Any = getattr(module, name)
    if not inspect.isfunction(found) and not inspect.isclass(found):
        value = list(found) if isinstance(found, dict) else found
        return f"### {module.__name__}.{name}\n\n```text\n{str(value).replace('typing.', '')}\n```\n"
    is_error = inspect.isclass(found) and issubclass(found, BaseException)
    signature = name if is_error else f"{name}{_signature(found)}"
    return f"### {module.__name__}.{name}\n\n```text\n{signature}\n```\n\n{_body(inspect.getdoc(found) or '')}\n"


def _signature(found: Any) -> str:
    given = inspect.signature(found)
    if hasattr(found, "model_fields"):  # Pydantic's annotations are for the parser
        given = given.replace(parameters=[one.replace(annotation=one.empty) for one in given.parameters.values()])
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(given))
    text = re.sub(r"\b(?:collections\.abc|typing|pathlib|os|torch\.nn\.modules\.module)\.", "", text)
    if len(text) <= 100:
        return text
    inside, _, after = text[1:].rpartition(")")
    return "(\n    " + ",\n    ".join(_split(inside)) + f",\n){after}"


def _split(arguments: str) -> list[str]:
    """Split at the commas that are not inside brackets."""
    parts, depth = [""], 0
    for mark in arguments:
        depth += (mark in "[(") - (mark in "])")
        if mark == "," and not depth:
            parts.append("")
        else:
            parts[-1] += mark
    return [part.strip() for part in parts]


def _body(docstring: str) -> str:
    """Return a docstring as Markdown: examples as blocks, sections as lists."""
    made: list[str] = []
    for block in re.split(r"\n\s*\n", docstring):
        lines = block.split("\n")
        title = lines[0].rstrip(":")
        if lines[0].startswith(">>>"):
            made.append("```text\n" + block + "\n```")
        elif title in SECTIONS and lines[0].endswith(":"):
            made.append(f"**{title}**\n\n" + "\n".join(_items(lines[1:])))
        else:
            made.append(_inline(block))
    return "\n\n".join(made)


def _items(lines: list[str]) -> list[str]:
    items: list[str] = []
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    for line in lines:
        text = line.strip()
        if len(line) - len(line.lstrip()) > indent:
            items[-1] += f" {_inline(text)}"
            continue
        name, colon, rest = text.partition(": ")
        named = colon and re.fullmatch(r"[\w*]+(, [\w*]+)*", name)
        items.append(f"- `{name}`: {_inline(rest)}" if named else f"- {_inline(text)}")
    return items


def _inline(text: str) -> str:
    return text.replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
