"""Writing files: the whole file or nothing, over another file only with `force`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rewriter.errors import ModelFileError
from rewriter.serialization import load_model, save_model, written_atomically


def test_an_existing_file_is_kept_without_force(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("precious")
    with pytest.raises(ModelFileError, match="--force"):
        save_model(nn.Linear(2, 2), path)
    assert path.read_text() == "precious"
    save_model(nn.Linear(2, 2), path, force=True)
    assert isinstance(load_model(path), nn.Linear)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_write_leaves_nothing_behind(tmp_path, failure):
    path = tmp_path / "model.pt"
    path.write_text("precious")
    with pytest.raises(failure), written_atomically(path, force=True) as temporary:
        temporary.write_text("half")
        raise failure
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_file_of_a_killed_save_is_removed_by_the_next(tmp_path):
    script = (
        "import os, signal, sys\nfrom rewriter.serialization import written_atomically\n"
        "with written_atomically(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script, tmp_path / "model.pt"], env=env)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".model.partial-") and left.endswith(".pt")
    save_model(nn.Linear(2, 2), tmp_path / "other.pt")
    assert sorted(os.listdir(tmp_path)) == [left, "other.pt"]
    save_model(nn.Linear(2, 2), tmp_path / "model.pt")
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "other.pt"]


def test_two_saves_at_once_leave_each_other_alone(tmp_path):
    with written_atomically(tmp_path / "model.pt", force=True) as first:
        first.write_text("first")
        with written_atomically(tmp_path / "model.pt", force=True) as second:
            second.write_text("second")
        assert first.read_text() == "first"
    assert (tmp_path / "model.pt").read_text() == "first"
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_model_that_cannot_be_saved_leaves_nothing_behind(tmp_path):
    model = nn.Linear(2, 2)
    model.hook = lambda x: x
    with pytest.raises(ModelFileError, match="the Linear cannot be saved"):
        save_model(model, tmp_path / "model.pt")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_and_a_special_file_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="does not exist"):
        save_model(nn.Linear(2, 2), tmp_path / "nowhere" / "model.pt")
    with pytest.raises(ModelFileError, match="not a regular file"):
        save_model(nn.Linear(2, 2), tmp_path, force=True)
    with pytest.raises(ModelFileError, match="not a regular file"):
        save_model(nn.Linear(2, 2), "/dev/null", force=True)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.pt").write_text("old")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    save_model(nn.Linear(2, 2), tmp_path / "link.pt", force=True)
    assert (tmp_path / "link.pt").is_symlink()
    assert isinstance(load_model(tmp_path / "real.pt"), nn.Linear)


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("")
    save_model(nn.Linear(2, 2), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_module_is_not_written_as_an_export(tmp_path):
    with pytest.raises(ModelFileError, match="export"):
        save_model(nn.Linear(2, 2), tmp_path / "model.pt2")


def test_torch_itself_reads_what_is_written(tmp_path):
    save_model(nn.Linear(2, 2), tmp_path / "model.pt")
    assert isinstance(torch.load(tmp_path / "model.pt", weights_only=False), nn.Linear)
