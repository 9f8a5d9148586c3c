"""Several threads for a test. A failure in a thread fails the test."""

from __future__ import annotations

import threading
from collections.abc import Callable


def run_threads(*functions: Callable[[], None]) -> None:
    """Run each function in its own thread, wait for all, and raise the first exception."""
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
