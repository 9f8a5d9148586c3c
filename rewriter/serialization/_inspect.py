"""What kind of file a model file is, and which names its pickles ask for, found without running any of it."""

from __future__ import annotations

import _compat_pickle
import io
import pickletools
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from rewriter.errors import ModelFileError

Kind = Literal["torch", "legacy", "exported", "safetensors"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DAMAGE = (ValueError, EOFError, UnicodeError, MemoryError, OverflowError)
"""What a damaged pickle raises; a length that was hit may ask for more memory than there is."""


@dataclass(frozen=True)
class ModelFile:
    """A model file, looked at and not yet read.

    Arguments:
        kind: ``torch`` and ``legacy`` are pickles, ``exported`` is an ExportedProgram.
        names: the dotted names of classes and functions that its pickles ask for, sorted.
    """

    path: Path
    kind: Kind
    names: tuple[str, ...] = ()


def inspect_file(path: Path) -> ModelFile:
    """Look at `path` and say what it is.

    Raises:
        ModelFileError: it is missing, no file, empty, damaged, or none of the formats that reparam reads.
    """
    try:
        if path.is_dir():
            raise ModelFileError(f"{path} is a directory, not a model file")
        with path.open("rb") as file:
            return _inspect(path, file)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist") from None
    except OSError as problem:
        raise ModelFileError(f"{path} cannot be read: {problem.strerror or problem}") from problem


def names_in_pickle(file: IO[bytes]) -> set[str]:
    """Return the dotted names of every class and function that the next pickle of `file` asks for.

    Raises:
        ValueError: it is no pickle, or one that is cut off.
    """
    names: set[str] = set()
    texts: list[str] = []
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            names.add(_current_name(module, name))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(texts[-2:]))
        elif opcode.name.startswith("EXT"):
            names.add(f"copyreg extension {argument}")
        if isinstance(argument, str) and "UNICODE" in opcode.name:
            texts.append(argument)
        elif opcode.name == "MEMOIZE" and texts:
            memo[len(memo)] = texts[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET") and argument in memo:
            texts.append(memo[argument])
    return names


def _inspect(path: Path, file: IO[bytes]) -> ModelFile:
    start = file.read(16)
    if not start:
        raise ModelFileError(f"{path} is empty")
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        return _inspect_archive(path, file)
    if len(start) > 8 and start[8:9] == b"{":
        return ModelFile(path, "safetensors")
    if start.startswith(b"\x80"):
        return _inspect_legacy(path, file)
    raise ModelFileError(
        f"{path} is no model file: neither what torch.save or torch.export.save writes, nor safetensors"
    )


def _inspect_archive(path: Path, file: IO[bytes]) -> ModelFile:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise ModelFileError(f"{path} is damaged: it holds entries twice")
            if "constants.pkl" in entries:
                raise ModelFileError(
                    f"{path} is a TorchScript archive, compiled already; give the module it was made from"
                )
            if "archive_format" in entries or "serialized_exported_program.json" in entries:
                return ModelFile(path, "exported")
            if "data.pkl" not in entries:
                raise ModelFileError(f"{path} is a zip archive, but none that torch.save wrote")
            if entries["data.pkl"].compress_type != zipfile.ZIP_STORED:
                raise ModelFileError(f"{path} is compressed, which torch.save never does")
            pickle = io.BytesIO(archive.read(entries["data.pkl"]))
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as problem:
        raise ModelFileError(f"{path} is damaged or cut off: {problem}") from problem
    try:
        return ModelFile(path, "torch", tuple(sorted(names_in_pickle(pickle))))
    except _DAMAGE as problem:
        raise ModelFileError(f"{path} is damaged: {problem}") from problem


def _inspect_legacy(path: Path, file: IO[bytes]) -> ModelFile:
    try:
        if _LEGACY_MAGIC not in [argument for _, argument, _ in pickletools.genops(file)]:
            raise ModelFileError(f"{path} is a plain pickle; write it with torch.save or reparam's save_model")
        names = set()
        for _ in range(3):
            names |= names_in_pickle(file)
    except _DAMAGE as problem:
        raise ModelFileError(f"{path} is damaged or cut off: {problem}") from problem
    return ModelFile(path, "legacy", tuple(sorted(names)))


def _current_name(module: str, name: str) -> str:
    # Protocol 2, torch.save's, writes builtins under their Python 2 names.
    if (module, name) in _compat_pickle.NAME_MAPPING:
        module, name = _compat_pickle.NAME_MAPPING[(module, name)]
    else:
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    return f"{module}.{name}"
