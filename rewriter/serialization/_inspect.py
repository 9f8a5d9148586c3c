"""The kind of a model file, found without reading the model."""

from __future__ import annotations

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from rewriter.errors import ModelFileError

Kind = Literal["torch", "legacy", "exported", "safetensors"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class ModelFile:
    """A model file that was not read yet.

    Arguments:
        kind: ``torch`` and ``legacy`` are pickles, ``exported`` is an ExportedProgram.
    """

    path: Path
    kind: Kind


def inspect_file(path: Path) -> ModelFile:
    """Return the kind of the file at `path`.

    Raises:
        ModelFileError: the file is missing, empty, damaged, or of no format that reparam reads.
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
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, NotImplementedError) as problem:
        raise ModelFileError(f"{path} is damaged or cut off: {problem}") from problem
    if "constants.pkl" in entries:
        raise ModelFileError(f"{path} is a TorchScript archive, compiled already; give the module it was made from")
    if any(name.startswith("data/aotinductor/") for name in entries):
        raise ModelFileError(f"{path} is a compiled AOTInductor package; give the program it was made from")
    if "archive_format" in entries or "serialized_exported_program.json" in entries:
        return ModelFile(path, "exported")
    if "data.pkl" not in entries:
        raise ModelFileError(f"{path} is a zip archive, but none that torch.save wrote")
    if entries["data.pkl"].compress_type != zipfile.ZIP_STORED:
        raise ModelFileError(f"{path} is compressed, which torch.save never does")
    return ModelFile(path, "torch")


def _inspect_legacy(path: Path, file: IO[bytes]) -> ModelFile:
    try:
        magic = [argument for _, argument, _ in pickletools.genops(file)]
    except (ValueError, EOFError, UnicodeError, MemoryError, OverflowError) as problem:
        raise ModelFileError(f"{path} is damaged or cut off: {problem}") from problem
    if _LEGACY_MAGIC not in magic:
        raise ModelFileError(f"{path} is a plain pickle; write it with torch.save or reparam's save_model")
    return ModelFile(path, "legacy")
