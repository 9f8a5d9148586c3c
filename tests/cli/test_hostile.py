"""Odd files and arguments."""

from __future__ import annotations

import filecmp
import io
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from rewriter.cli import main
from rewriter.io import load_model

CHECKOUT = Path(__file__).parents[2]


def _stdin(content: bytes) -> types.SimpleNamespace:
    return types.SimpleNamespace(buffer=io.BytesIO(content))


def test_spec_is_read_from_stdin(reparam, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", _stdin((folder / "spec.yaml").read_bytes()))
    result = reparam("plan", "-", "model.pt", "--json")
    assert result.code == 0, result.err
    assert [site["name"] for site in result.json["sites"]] == ["0.weight", "2.weight"]


@pytest.mark.parametrize("content", [b"", b"spec.yaml", b"\xff\xfe", b"\0", b"reparam: 1\nrules: [", None])
def test_invalid_stdin_is_a_spec_error(reparam, folder, monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", None if content is None else _stdin(content))
    result = reparam("validate", "-", "--json")
    assert result.code == 3
    assert result.json["error"]["diagnostics"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_spec_is_read_from_a_pipe(reparam, folder):
    text = (folder / "spec.yaml").read_text()
    os.mkfifo("pipe")
    writer = subprocess.Popen([sys.executable, "-c", f"open('pipe', 'w').write({text!r})"])
    assert reparam("validate", "pipe").code == 0
    assert writer.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("apply", "spec.yaml", "model.pt", "-o", "-"), 2, "not to stdout"),
        (("bake", "model.pt", "-o", "-"), 2, "not to stdout"),
        (("inspect", "-"), 6, "a model is read from a file; only SPEC can be - for stdin"),
        (("apply", "spec.yaml", "model.pt", "-o", "model.pt"), 6, "--force"),
        (("apply", "spec.yaml", "model.pt", "-o", "spec.yaml", "--force"), 2, "the spec itself"),
        (("apply", "spec.yaml", "model.pt", "-o", "nowhere/out.pt"), 6, "nowhere does not exist"),
        (("apply", "spec.yaml", "model.pt", "-o", "."), 6, "not a regular file"),
        (("apply", "spec.yaml", "model.pt", "-o", ""), 6, "not a regular file"),
        (("apply", "spec.yaml", "model.pt", "-o", "/dev/null", "--force"), 6, "not a regular file"),
        (("apply", "spec.yaml", "model.pt", "-o", "spec.yaml/out.pt"), 6, "cannot be written"),
        (("apply", "spec.yaml", "model.pt", "-o", "a" * 300 + ".pt"), 6, "cannot be written"),
        (("plan", "a" * 300 + ".yaml", "model.pt"), 3, "cannot be read"),
        (("plan", "spec.yaml", "a" * 300 + ".pt"), 6, "cannot be read"),
        (("plan", "model.pt", "spec.yaml"), 3, "not UTF-8"),
        (("plan", "", "model.pt"), 3, "directory"),
        (("plan", "spec.yaml", ""), 6, "directory"),
        (("plan", "spec.yaml", "model.pt", "extra"), 2, "extra"),
        (("explain", "spec.yaml", "model.pt", ""), 4, "no tensor ''"),
        (("diff", "model.pt", "nothing.pt"), 6, "does not exist"),
        (("draw", "nothing.pt"), 6, "does not exist"),
        (("inspect", "spec.yaml"), 6, "no model file"),
        (("bake", "spec.yaml", "-o", "out.pt"), 6, "no model file"),
        (("catalog", ""), 2, "unknown"),
        (("schema", "--no-such"), 2, "--no-such"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else str(value)[:30],
)
def test_odd_arguments_exit_with_a_code_and_change_no_file(refused, folder, arguments, code, message):
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    refused(arguments, code, message)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == files


def test_folder_without_write_permission_is_refused_first(reparam, folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    monkeypatch.setattr("rewriter.rewrite", None, raising=False)
    result = reparam("apply", "spec.yaml", "model.pt", "-o", "out.pt")
    assert result.code == 6
    assert "no permission" in result.err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can read every file")
def test_files_without_read_permission_are_refused(reparam, folder):
    (folder / "spec.yaml").chmod(0)
    assert reparam("plan", "spec.yaml", "model.pt").code == 3
    (folder / "spec.yaml").chmod(0o600)
    (folder / "model.pt").chmod(0)
    assert reparam("plan", "spec.yaml", "model.pt").code == 6


def test_input_can_be_the_output_with_force(reparam, folder):
    assert reparam("apply", "spec.yaml", "model.pt", "-o", "model.pt", "--force").code == 0
    assert reparam("bake", "model.pt", "-o", "model.pt", "--force").code == 0
    assert type(load_model("model.pt")) is nn.Sequential


def test_link_remains_a_link(reparam, folder):
    (folder / "link.pt").symlink_to("model.pt")
    assert reparam("apply", "spec.yaml", "model.pt", "-o", "link.pt", "--force").code == 0
    assert (folder / "link.pt").is_symlink()
    assert reparam("inspect", "model.pt", "--json").json["tensors"][0]["chain"] == ["symmetric"]


@pytest.mark.parametrize("name", ["plain", ".hidden", "мо дель✓.pt", "-dash.pt", "two\nlines.pt", "50%.pt"])
def test_any_file_name_works(reparam, folder, name):
    assert reparam("apply", "spec.yaml", "model.pt", "-o", f"./{name}", "--json").json["output"] == name
    assert f"{name}: Sequential" in reparam("inspect", f"./{name}").out
    assert reparam("bake", f"./{name}", "-o", f"./{name}", "--force").code == 0


def test_names_in_other_scripts_work(reparam, folder):
    model = nn.Module()
    model.add_module("вес", nn.Linear(4, 4))
    torch.save(model, "model.pt")
    text = "reparam: 1\nrules:\n  - {name: 規則, select: 'вес.weight', chain: [symmetric]}\n"
    (folder / "unicode.yaml").write_text(text, encoding="utf-8")
    assert reparam("apply", "unicode.yaml", "model.pt", "-o", "out.pt").code == 0
    baked = reparam("bake", "out.pt", "-o", "baked.pt", "--only", "規則", "--json")
    assert baked.json["baked"] == ["вес.weight"]


def test_equal_inputs_give_equal_files(reparam, folder):
    for name in ("one.pt", "two.pt"):
        assert reparam("apply", "spec.yaml", "model.pt", "-o", name).code == 0
    assert filecmp.cmp(folder / "one.pt", folder / "two.pt", shallow=False)


def test_version(reparam):
    result = reparam("--version")
    assert result.code == 0
    assert result.out.startswith("reparam")


@pytest.mark.slow
def test_error_of_torch_is_one_line_without_its_log(folder):
    command = ["plan", "spec.yaml", "model.pt", "--capture", "export", "--example", "float32[2,5]"]
    result = subprocess.run(
        [sys.executable, CHECKOUT / "cli.py", *command], capture_output=True, text=True, encoding="utf-8", timeout=100
    )
    assert result.returncode == 4
    assert result.stderr.startswith("torch.export cannot capture Sequential: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_interrupt_exits_with_a_message(folder):
    command = [sys.executable, CHECKOUT / "cli.py", "validate", "-"]
    running = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background process of a shell ignores interrupts, and its children do, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    running.stdin.write("# more than the buffer of a pipe: write returns when the command reads\n" * 20_000)
    running.stdin.flush()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err.strip() == "interrupted"


def test_error_for_a_reader_that_has_gone_is_quiet(folder, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as ended:
        main(["validate", "missing.yaml", "--json"])
    assert ended.value.code == 3
