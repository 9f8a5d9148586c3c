"""What the public verbs are given where they want a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from rewriter.errors import CaptureError, RewriterError


def check_model(model: Any, verb: str) -> None:
    """Refuse what is no model.

    Raises:
        RewriterError: says what to give instead.
    """
    if isinstance(model, (nn.Module, ExportedProgram)):
        return
    kind = type(model).__name__
    found = f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"
    hint = ""
    if isinstance(model, type):
        found = f"the class {model.__name__}"
        hint = f"; make one: {model.__name__}(…)"
    elif isinstance(model, (str, os.PathLike)):
        hint = "; rewriter.io.load_model reads one from a file"
    elif isinstance(model, Mapping):
        hint = "; load the weights into their model first"
    raise RewriterError(f"{verb} takes a torch.nn.Module or an ExportedProgram, not {found}{hint}")


def check_capture_name(capture: str) -> None:
    """Refuse a way of capturing that there is not.

    Raises:
        CaptureError: names those there are.
    """
    if capture not in ("auto", "graph", "module", "export"):
        raise CaptureError(f"capture is 'auto', 'graph', 'module' or 'export', not {capture!r}")
