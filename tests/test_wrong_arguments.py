"""Typical mistakes in Python calls get a message that says what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rewriter

RULE = {"name": "s", "select": "0.weight", "chain": ["symmetric"]}
SPEC = {"reparam": 1, "rules": [RULE]}
MISTAKES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "rules instead of a spec": (lambda model: rewriter.rewrite(model, [RULE]), 'write {"reparam": 1, "rules": […]}'),
    "rules as a mapping": (lambda model: rewriter.plan(model, {**SPEC, "rules": RULE}), "start each rule with `- `"),
    "class as a selector": (
        lambda model: rewriter.plan(model, {**SPEC, "rules": [{**RULE, "select": nn.Linear}]}),
        'write {"module": "torch.nn.modules.linear.Linear"}',
    ),
    "spec and model swapped": (lambda model: rewriter.rewrite(SPEC, model), "not a dict"),
    "module as a factory": (
        lambda model: rewriter.io.load_model("weights.pt", model=model),  # type: ignore[arg-type]
        "model=lambda: net",
    ),
    "class as a name": (lambda model: rewriter.register(nn.Softplus), 'write @register("name") above the class'),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_argument_gets_a_remedy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 4))
    torch.save(model.state_dict(), "weights.pt")
    call, remedy = MISTAKES[name]
    with pytest.raises((rewriter.RewriterError, TypeError)) as problem:
        call(model)
    assert remedy in str(problem.value)
