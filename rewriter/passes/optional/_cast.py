"""cast: under autocast a value of several uses is cast once, where all of them would cast it."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from rewriter.passes._infra import Lowering, Pass, PassError, evaluations_of

CASTING = frozenset(
    {
        F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
        torch.addmm, torch.baddbmm, torch.bmm, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.mm,
        operator.matmul,
    }
)  # fmt: skip
"""Functions that autocast runs in its own precision on every device: whatever they get, they cast."""

CASTING_METHODS = frozenset({"addmm", "baddbmm", "bmm", "matmul", "mm", "__matmul__"})
_VIEWS = frozenset({"t", "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze"})
_VIEW_ATTRIBUTES = frozenset({"T", "mT"})
_VIEW_FUNCTIONS = frozenset({torch.t, torch.transpose, torch.permute, torch.reshape, torch.unsqueeze, torch.squeeze})


def cast_once(lowering: Lowering) -> bool:
    """Mark the evaluations whose every use casts, and that have more than one.

    A plain weight is cast once in a region of autocast, since autocast remembers what it made of a Parameter; a
    computed value is none. Gradients of the uses then add up in autocast's precision, as a plain weight's do.
    """
    marked = False
    for site, nodes in evaluations_of(lowering).items():
        wanted = len(site.spec.members) == 1 and site.spec.members[0].dtype == "float32"
        for node in nodes:
            kwargs = {name: value for name, value in node.kwargs.items() if name != "cast"}
            if wanted and len(node.users) > 1 and all(casts(user, node) for user in node.users):
                kwargs["cast"] = True
                marked = True
            if kwargs != node.kwargs:
                node.kwargs = kwargs
    return marked


def _casting_function(target: Any) -> bool:
    return target in CASTING or getattr(target, "casts_under_autocast", False)


def casts(user: fx.Node, value: fx.Node) -> bool:
    """Whether autocast casts `value` in this use, or in every use of the view that this is."""
    if user.op == "call_function":
        if _casting_function(user.target):
            return True
        view = user.target in _VIEW_FUNCTIONS or (user.target is getattr and user.args[1] in _VIEW_ATTRIBUTES)
    elif user.op == "call_method":
        if user.target in CASTING_METHODS:
            return True
        view = user.target in _VIEWS
    else:
        return False
    return view and user.args[:1] == (value,) and bool(user.users) and all(casts(use, user) for use in user.users)


def _only_where_all_cast(lowering: Lowering) -> None:
    for site, nodes in evaluations_of(lowering).items():
        for node in nodes:
            if node.kwargs.get("cast") and not all(casts(user, node) for user in node.users):
                raise PassError(f"{site.spec.name} is cast for a use that wants it as it is")


cast_pass = Pass("cast", cast_once, ensures=_only_where_all_cast)
