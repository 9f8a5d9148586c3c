"""The tensors in exported files, read without running code of them."""

from __future__ import annotations

import importlib
import io
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.errors import ModelFileError

_LARGEST_PICKLE = 1 << 28


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Arguments:
        dtype: its name, such as ``float32``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


def read_contents(path: Path) -> tuple[str, list[Stored]] | None:
    """Return the kind of an exported file and its tensors; ``None`` for a file that `load_model` reads.

    Raises:
        ModelFileError: the file is damaged, or onnx is not installed.
    """
    if path.suffix.lower() == ".onnx" and path.is_file():
        return "ONNX", _in_onnx(path)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        if any(name.startswith("data/aotinductor/") for name in names):
            return "AOTInductor package", []
        if "constants.pkl" not in names or "data.pkl" not in names:
            return None
        if archive.getinfo(names["data.pkl"]).file_size > _LARGEST_PICKLE:
            raise ModelFileError(f"{path} is damaged: the list of its tensors has more than {_LARGEST_PICKLE} bytes")
        data = archive.read(names["data.pkl"])
    try:
        root = _Unpickler(io.BytesIO(data)).load()
    except Exception as problem:
        raise ModelFileError(f"{path} is damaged: {problem}") from problem
    return "TorchScript", list(_tensors_in(root, ""))


def _in_onnx(path: Path) -> list[Stored]:
    try:
        onnx = importlib.import_module("onnx")
    except ImportError:
        raise ModelFileError(f"reading {path} needs onnx: pip install 'reparam[onnx]'") from None
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as problem:
        raise ModelFileError(f"{path} cannot be read as ONNX: {problem}") from problem
    dtype_of = importlib.import_module("onnx.helper").tensor_dtype_to_np_dtype
    return [Stored(one.name, tuple(one.dims), dtype_of(one.data_type).name) for one in graph.initializer]


class _Object:
    """Stands for an object of a class that the file names; nothing of the class runs."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Tensor(_Object):
    """Stands for a tensor."""

    def __init__(self, storage: Any = None, offset: Any = None, size: Any = (), *_: Any) -> None:
        super().__init__()
        self.size, self.storage = size, storage


class _Unpickler(pickle.Unpickler):
    """Makes stand-ins and calls no function that the file names."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _Tensor
        return type(name, (_Object,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        return pid


_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


def _tensors_in(value: Any, name: str) -> Iterator[Stored]:
    if isinstance(value, _Tensor):
        kind = value.storage[1].__name__ if isinstance(value.storage, tuple) else "?"
        yield Stored(name, tuple(value.size), _DTYPES.get(kind) or kind.removesuffix("Storage").lower())
    elif isinstance(value, _Object) and isinstance(value.state, dict):
        for key, one in value.state.items():
            yield from _tensors_in(one, f"{name}.{key}" if name else str(key))
