"""Messages on stderr: progress, notes and warnings."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console

stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
_verbose = False


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Set what is printed on stderr; warnings and errors always are."""
    global _verbose
    stderr.quiet, _verbose = quiet, verbose


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Show `text` on a terminal while the body runs; with ``--verbose``, print its duration."""
    start = time.perf_counter()
    with stderr.status(text):
        yield
    if _verbose:
        stderr.print(f"{text}: {time.perf_counter() - start:.1f} s")
