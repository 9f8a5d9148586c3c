"""Damaged and lying checkpoints are refused before anything is written; a killed run leaves nothing half done."""

from __future__ import annotations

import filecmp
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rewriter import ModelFileError, RewriterError
from rewriter.streaming import bake_checkpoint
from tests.streaming.conftest import assert_equal, read_folder, spec, write_folder

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
RULES = spec("symmetric")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = [{"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4)}, {"b.weight": torch.randn(4, 4)}]
    return write_folder(tmp_path / "in", shards, config_json="{}")


def header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write a file with another header over the same bytes."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    text = change(entries) or entries
    encoded = text if isinstance(text, bytes) else json.dumps(text).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads((folder / INDEX).read_text())
    text = change(found) or found
    (folder / INDEX).write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())


def grow(file: Path, by: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:by] if by < 0 else content + b"x" * by)


def moved(entries: dict[str, Any], name: str, start: int, end: int) -> None:
    entries[name]["data_offsets"] = [start, end]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: (f / SECOND).unlink(), "cannot be read"),
    "empty shard": (lambda f: (f / SECOND).write_bytes(b""), "no header"),
    "cut off": (lambda f: grow(f / SECOND, -1), "is cut off"),
    "too long": (lambda f: grow(f / SECOND, 1), "bytes that no tensor owns"),
    "no safetensors": (lambda f: (f / SECOND).write_bytes(b"\x80\x02" * 100), "no header"),
    "no JSON": (lambda f: header(f / FIRST, lambda e: b"{nonsense"), "is no JSON"),
    "nested deeply": (lambda f: header(f / FIRST, lambda e: b"[" * 100_000), "is no JSON"),
    "a list": (lambda f: header(f / FIRST, lambda e: b"[]"), "no JSON object"),
    "key twice": (lambda f: header(f / FIRST, lambda e: b'{"a": {}, "a": {}}'), "key 'a' twice"),
    "huge header": (lambda f: (f / FIRST).write_bytes(struct.pack("<Q", 2**62) + b"{}"), "no header"),
    "offsets beyond the file": (
        lambda f: header(f / SECOND, lambda e: moved(e, "b.weight", 10**9, 10**9 + 64)),
        "leaves a gap",
    ),
    "negative offsets": (lambda f: header(f / SECOND, lambda e: moved(e, "b.weight", -64, 0)), "no lists of sizes"),
    "offsets of another size": (lambda f: header(f / SECOND, lambda e: moved(e, "b.weight", 0, 32)), "takes 64 bytes"),
    "overlap": (lambda f: header(f / FIRST, lambda e: moved(e, "a.weight", 0, 64)), "overlaps"),
    "another shape": (lambda f: header(f / SECOND, lambda e: e["b.weight"].update(shape=[4, 5])), "takes 80 bytes"),
    "shape of truths": (lambda f: header(f / SECOND, lambda e: e["b.weight"].update(shape=[True, 16])), "no lists"),
    "unknown dtype": (lambda f: header(f / SECOND, lambda e: e["b.weight"].update(dtype="F7")), "the dtype 'F7'"),
    "extra entry": (lambda f: header(f / SECOND, lambda e: e["b.weight"].update(more=1)), "does not consist"),
    "metadata of numbers": (lambda f: header(f / FIRST, lambda e: e.update(__metadata__={"a": 1})), "mapping of texts"),
    "a path as a name": (lambda f: header(f / SECOND, lambda e: {"../x": e.pop("b.weight")}), "no name of a tensor"),
    "index with a path": (
        lambda f: index(f, lambda i: i["weight_map"].update({"b.weight": f"../in/{SECOND}"})),
        "no file",
    ),
    "index with an absolute path": (
        lambda f: index(f, lambda i: i["weight_map"].update({"b.weight": str(f / SECOND)})),
        "no file of its folder",
    ),
    "index with a number": (lambda f: index(f, lambda i: i["weight_map"].update({"b.weight": 7})), "no file of its"),
    "index without a map": (lambda f: index(f, lambda i: {"metadata": {}}), "no weight_map"),
    "index with a key twice": (
        lambda f: index(f, lambda i: json.dumps(i).replace('"a.bias"', '"a.weight"').encode()),
        "twice",
    ),
    "index names a tensor that no shard has": (
        lambda f: index(f, lambda i: i["weight_map"].update({"c.weight": FIRST})),
        "it is in no shard",
    ),
    "index has another shard for a tensor": (
        lambda f: index(f, lambda i: i["weight_map"].update({"a.bias": SECOND})),
        f"is in {SECOND}, and it is in {FIRST}",
    ),
    "index lacks a tensor": (lambda f: index(f, lambda i: i["weight_map"].pop("a.bias") and i), "is in no file"),
    "one tensor in two shards": (
        lambda f: save_file({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}, f / SECOND),
        "is in model-00001",
    ),
    "two indexes": (lambda f: (f / f"other.{INDEX}").write_text("{}"), "several indexes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(damage: str, folder: Path) -> None:
    make, message = DAMAGES[damage]
    make(folder)
    with pytest.raises(ModelFileError, match=message):
        bake_checkpoint(folder, RULES, folder.parent / "out")
    assert [file.name for file in folder.parent.iterdir()] == ["in"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_of_headers_never_crash(data: st.DataObject, folder: Path) -> None:
    file = folder / data.draw(st.sampled_from([FIRST, SECOND, INDEX]))
    before = file.read_bytes()
    changed = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, min(len(changed), 300) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(changed)
    try:
        bake_checkpoint(folder, RULES, folder.parent / "out", force=True)
    except RewriterError:
        pass
    finally:
        file.write_bytes(before)


def test_a_file_name_with_the_name_of_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ModelFileError, match="no safetensors file"):
        bake_checkpoint(tmp_path / "in", RULES, tmp_path / "out")


def test_an_existing_folder_is_kept_unless_forced(folder: Path) -> None:
    out = folder.parent / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ModelFileError, match="--force"):
        bake_checkpoint(folder, RULES, out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    bake_checkpoint(folder, RULES, out, force=True)
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in folder.iterdir())


class Killed(Exception):
    pass


@pytest.fixture
def interrupted(folder: Path) -> Path:
    """The output of a run that ended after its first shard."""
    total = 0

    def report(count: int, nbytes: int) -> None:
        nonlocal total
        total += count
        if total > 80:
            raise Killed

    with pytest.raises(Killed):
        bake_checkpoint(folder, RULES, folder.parent / "out", report=report, workers=1)
    return folder.parent / "out"


def test_a_run_that_ends_early_leaves_nothing_under_the_final_name(interrupted: Path) -> None:
    assert not interrupted.exists()


@pytest.mark.parametrize("damage", [None, "shard", "manifest"])
def test_resume_keeps_verified_shards_and_gives_the_same_bytes(
    interrupted: Path, folder: Path, damage: str | None
) -> None:
    partial = interrupted.parent / ".out.partial"
    if damage == "shard":
        content = (partial / FIRST).read_bytes()
        (partial / FIRST).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if damage == "manifest":
        (partial / ".reparam.0.json").write_text("nonsense")
    done = bake_checkpoint(folder, RULES, interrupted, resume=True)
    assert done.written.kept == ([FIRST] if damage is None else [])
    bake_checkpoint(folder, RULES, folder.parent / "again")
    for file in (folder.parent / "again").iterdir():
        assert filecmp.cmp(interrupted / file.name, file, shallow=False)
    assert sorted(one.name for one in interrupted.iterdir()) == sorted(one.name for one in folder.iterdir())
    assert not partial.exists()


def test_resume_with_another_spec_starts_again(interrupted: Path, folder: Path) -> None:
    done = bake_checkpoint(folder, spec("skew"), interrupted, resume=True)
    assert done.written.kept == []
    bake_checkpoint(folder, spec("skew"), folder.parent / "again")
    assert_equal(read_folder(interrupted), read_folder(folder.parent / "again"))


def test_without_resume_a_run_starts_again(interrupted: Path, folder: Path) -> None:
    assert bake_checkpoint(folder, RULES, interrupted).written.kept == []


@pytest.mark.slow
def test_a_killed_process_leaves_no_file_under_a_final_name(tmp_path: Path) -> None:
    shards = [{f"{number}.weight": torch.randn(1000, 1000)} for number in range(12)]
    write_folder(tmp_path / "in", shards, config_json="{}")
    (tmp_path / "spec.yaml").write_text(json.dumps(spec("stiefel")))
    command = [sys.executable, "-m", "rewriter", "bake", "in", "--spec", "spec.yaml", "-o", "out", "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: another number rounds otherwise
    partial = tmp_path / ".out.partial"
    for files in (1, 4, 8):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(partial.glob("model-*.safetensors"))) < files:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (tmp_path / "out").exists()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stderr=subprocess.DEVNULL)
    bake_checkpoint(tmp_path / "in", spec("stiefel"), tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        assert filecmp.cmp(tmp_path / "out" / file.name, file, shallow=False)
