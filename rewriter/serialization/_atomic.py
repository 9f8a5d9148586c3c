"""Output files that exist as a whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rewriter.errors import ModelFileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def check_writable(path: str | os.PathLike[str], force: bool) -> Path:
    """Return `path` with links followed, if an output may be written there.

    Raises:
        ModelFileError: the file exists and `force` is not given, it is no regular file, or has no folder.
    """
    target = Path(os.path.realpath(path))
    try:
        if any(one.exists() and not one.is_file() for one in (Path(path), target)):
            raise ModelFileError(f"{path} is not a regular file; choose another name for the output")
        if target.exists() and not force:
            raise ModelFileError(f"{path} exists; --force (or force=True) overwrites it")
        if not target.parent.is_dir():
            raise ModelFileError(f"{path} cannot be written: the folder {target.parent} does not exist")
        # Before hours of work, not after.
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise ModelFileError(f"{path} cannot be written: no permission to write to the folder {target.parent}")
    except (OSError, ValueError) as problem:
        raise ModelFileError(f"{path} cannot be written: {getattr(problem, 'strerror', None) or problem}") from problem
    return target


@contextlib.contextmanager
def written_atomically(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Give the body a temporary file beside `path`, and rename it to `path` when the body ends.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written_atomically(f"{folder}/out.txt") as temporary:
    ...         _ = temporary.write_text("all of it")
    ...     Path(f"{folder}/out.txt").read_text()
    'all of it'

    An error or an interrupt leaves `path` as it was and removes the temporary file. A killed process leaves the
    temporary file, and the next save to `path` removes it.

    Raises:
        ModelFileError: as `check_writable`, or the system refuses to write there.
    """
    target = check_writable(path, force)
    prefix = f".{target.stem:.100}.partial-"
    _remove_partial(target.parent, prefix, target.suffix)
    try:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=target.suffix, dir=target.parent)
    except OSError as problem:
        raise ModelFileError(f"{path} cannot be written: {problem.strerror}") from problem
    temporary = Path(name)
    try:
        with contextlib.suppress(OSError):
            lock(handle)
        yield temporary
        _publish(temporary, target, force)
    except OSError as problem:
        raise ModelFileError(f"{path} cannot be written: {problem.strerror or problem}") from problem
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _remove_partial(folder: Path, prefix: str, suffix: str) -> None:
    """Remove temporary files of saves that were killed: the system has released their locks."""
    for partial in folder.glob(f"{glob.escape(prefix)}*{glob.escape(suffix)}"):
        with contextlib.suppress(OSError), partial.open("rb+") as file:
            lock(file.fileno())
            partial.unlink()


def lock(handle: int) -> None:
    """Lock an open file, or raise OSError: BlockingIOError if another process has it."""
    # Without locks, as on some network disks, temporary files of others are left alone.
    if fcntl is None:
        raise OSError("this system has no file locks")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _publish(temporary: Path, target: Path, force: bool) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
    if not force and target.exists():
        raise ModelFileError(
            f"{target} was written by another process meanwhile; --force (or force=True) overwrites it"
        )
    temporary.replace(target)


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
