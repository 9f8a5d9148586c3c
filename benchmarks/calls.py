"""Print how much of the package one small rewrite runs: ``python benchmarks/calls.py``.

It counts the functions, and the files they are in, that `rewrite` of one Linear layer enters. The first call is not
counted: it imports modules and fills tables. Calls into torch and Python's library are not counted either. A lambda, a
comprehension or a generator expression belongs to the function around it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)

import torch  # noqa: E402

import rewriter  # noqa: E402

PACKAGE = Path(rewriter.__file__).parent
FUNCTIONS, FILES = 160, 45
"""The most that one rewrite should enter."""

SPEC = {"reparam": 1, "rules": [{"name": "w", "select": "0.weight", "chain": ["weight_norm"]}]}


def entered(run: Callable[[], Any]) -> Counter[CodeType]:
    """Return how often `run` enters each function of the package."""
    found: Counter[CodeType] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and not code.co_name.startswith("<") and Path(code.co_filename).is_relative_to(PACKAGE):
            found[code] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def main() -> int:
    """Print the two numbers, then the files with their functions; return 1 if a number is above its bound."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    rewriter.rewrite(model, SPEC)
    found = entered(lambda: rewriter.rewrite(model, SPEC))
    files = Counter(str(Path(code.co_filename).relative_to(PACKAGE)) for code in found)
    print(f"rewrite of one Linear enters {len(found)} functions (at most {FUNCTIONS}) in {len(files)} files ({FILES})")
    for file, count in files.most_common():
        print(f"  {count:3}  {file}")
    return int(len(found) > FUNCTIONS or len(files) > FILES)


if __name__ == "__main__":
    sys.exit(main())
