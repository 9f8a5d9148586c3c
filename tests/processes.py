"""New processes for a test. A fork of a process that has computed may wait for threads that it does not have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_processes(worker: Callable[..., None], folder: Path, processes: int, patience: float = 120) -> None:
    """Run ``worker(rank, folder)`` in `processes` processes; its module ends with a call of `work`.

    Raises:
        AssertionError: one of them fails; the message is its output.
        subprocess.TimeoutExpired: one of them takes longer than `patience` seconds.
    """
    command = [sys.executable, "-m", worker.__module__, worker.__name__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}  # no look-up of the host's name
    started = []
    try:
        for rank in range(processes):
            with (folder / f"log{rank}").open("w") as log:
                started.append(
                    subprocess.Popen(
                        [*command, str(rank), str(folder)], cwd=ROOT, env=environment, stdout=log, stderr=log
                    )
                )
        for rank, process in enumerate(started):
            code = process.wait(timeout=patience)
            assert code == 0, (folder / f"log{rank}").read_text()
    finally:
        for process in started:
            process.kill()
            process.wait()


def work(functions: dict[str, Any]) -> None:
    """Run the function that the command line names, and end the process at once.

    Without that, threads of torch.distributed sometimes abort the process while the interpreter shuts down.
    """
    functions[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
    sys.stdout.flush()
    os._exit(0)
