"""What people expect of every command: help with examples, verbosity, no colours for files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rewriter.cli._app import EXAMPLES, app
from rewriter.cli._outcome import EXIT_CODES, INTERRUPTED, UNEXPECTED, USAGE

CHECKOUT = Path(__file__).parents[2]
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)


@pytest.fixture
def rewritten(reparam, folder):
    assert reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt").code == 0
    assert reparam("bake", "rewritten.pt", "-o", "plain.pt").code == 0
    for name in ("FOLDER", "OTHER", "BASE", "REWRITTEN", "BAKED"):
        (folder / name).mkdir()
        save_file({"0.weight": torch.ones(4, 4)}, folder / name / "model.safetensors")
    for name in ("ADAPTER", "one", "two"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
        parts = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
        named = {f"base_model.model.0.{part}.weight": tensor for part, tensor in parts.items()}
        save_file(named, folder / name / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples(reparam, command):
    assert EXAMPLES[command]
    short = reparam(command, "-h")
    assert short.code == 0
    assert short.out == reparam(command, "--help").out
    for example in EXAMPLES[command]:
        assert " ".join(example.split()) in " ".join(short.out.split())


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, marks=pytest.mark.slow if ".pt2" in example else ())
        for name in COMMANDS
        if name != "demo"
        for example in EXAMPLES[name]
    ],
)
def test_example_of_a_help_text_works(reparam, rewritten, example):
    words = shlex.split(example.partition(" > ")[0])
    assert words[0] == "reparam"
    force = ["--force"] if {"-o", "--output"} & set(words) else []
    result = reparam(*words[1:], *force)
    assert result.code == 0, result.err


def test_quiet_prints_no_progress(reparam, folder):
    result = reparam("apply", "spec.yaml", "model.pt", "-o", "out.pt", "-q")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert "even" in reparam("plan", "spec.yaml", "model.pt", "--quiet").out
    assert "warning: bake found no computed tensor" in reparam("bake", "model.pt", "-o", "baked.pt", "-q").err


@pytest.mark.parametrize(
    ("command", "steps"),
    [
        ("plan spec.yaml model.pt", ["loading torch", "reading spec.yaml", "reading model.pt", "planning"]),
        ("plan spec.yaml FOLDER", ["reading spec.yaml", "planning"]),
        ("apply spec.yaml model.pt -o out.pt", ["planning", "rewriting", "checking", "writing out.pt"]),
        ("bake rewritten.pt -o out.pt", ["reading rewritten.pt", "baking", "writing out.pt"]),
        ("init model.pt --for prune", ["reading model.pt"]),
        ("inspect model.pt", ["reading model.pt"]),
        ("explain spec.yaml model.pt 0.bias", ["reading spec.yaml", "reading model.pt"]),
        ("diff model.pt plain.pt", ["reading model.pt", "reading plain.pt", "comparing"]),
        ("draw model.pt", ["reading model.pt", "tracing"]),
        ("report model.pt plain.pt -o out.html", ["evaluating", "drawing", "writing out.html"]),
    ],
)
def test_verbose_prints_the_duration_of_each_step(reparam, rewritten, command, steps):
    timed = re.findall(r"^(.*): \d+\.\d s$", reparam(*command.split(), "-v").err, re.M)
    assert [step for step in timed if step in steps] == steps
    assert "0.0 s" not in reparam(*command.split(), *(["--force"] if "-o" in command else [])).err


@pytest.mark.parametrize("arguments", [["--help"], pytest.param(["catalog"], marks=pytest.mark.slow)])
def test_no_color_turns_colours_off(arguments):
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "rewriter", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert result.returncode == 0
    assert not re.search(r"\x1b\[[\d;]*3\d", result.stdout)


def test_docs_list_the_commands_and_exit_codes():
    page = (CHECKOUT / "README.md").read_text()
    listed = page.partition("## Command line")[2].partition("```text\n")[2].partition("```")[0]
    assert sorted(re.findall(r"^reparam (\w+)", listed, re.M)) == COMMANDS
    codes = re.findall(r"^\| (\d+) \|", (CHECKOUT / "docs" / "json.md").read_text(), re.M)
    assert {int(code) for code in codes} == {0, UNEXPECTED, USAGE, INTERRUPTED, *EXIT_CODES.values()}


def test_main_help_lists_the_commands_with_examples(reparam):
    shown = reparam("-h").out
    listed = [word for word in re.findall(r"^│ (\w+) ", shown, re.M) if word in COMMANDS]
    assert (listed[:3], sorted(listed)) == (["demo", "init", "recipes"], COMMANDS)
    assert "reparam init model.pt --for spectral-norm -o spec.yaml" in shown
