"""New processes for a test. A fork of a process that has computed may wait for threads that it does not have."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

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


@contextlib.contextmanager
def joined(rank: int, folder: str, processes: int) -> Iterator[None]:
    """Be one of the processes that gloo joins, and end this process with the block, while all objects in it live.

    Freeing DistributedDataParallel's reducer waits for gloo's thread, which may wait for the interpreter's lock that
    the caller has. The processes meet in a file: another run may take a port between finding it free and using it.
    """
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", timeout=timedelta(seconds=60), rank=rank, world_size=processes
    )
    yield
    sys.stdout.flush()
    os._exit(0)


def work(functions: dict[str, Any]) -> None:
    """Run the function that the command line names, and end the process at once, whatever it raises.

    Without that, threads of torch.distributed sometimes abort the process while the interpreter shuts down.
    """
    try:
        functions[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
    except BaseException:  # while its frames live
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
