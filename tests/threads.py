"""Several threads of a test, whose failures fail the test."""

from __future__ import annotations

import threading
from collections.abc import Callable


def run_threads(*functions: Callable[[], None]) -> None:
    """Run each function in a thread of its own, wait for all, and raise what one of them raised."""
    problems: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for problem in problems:
        raise problem
