"""Bad input gives a message and an exit code, one document with --json, and no traceback."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

fuzzing = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("frobnicate",), 2, "No such command"),
        (("bake", "model.pt"), 2, "--output"),
        (("bake", "model.pt", "-o", "x.pt", "--format", "tflite"), 2, "tflite"),
        (("apply", "spec.yaml", "model.pt"), 2, "-o OUT"),
        (("plan", "spec.yaml", "model.pt", "--capture", "magic"), 2, "magic"),
        (("apply", "spec.yaml", "model.pt", "-o", "x.pt", "--capture", "export"), 2, "--example float32[2,3]"),
        (("bake", "model.pt", "-o", "x.onnx"), 2, "--example float32[2,3]"),
        (("bake", "model.pt", "-o", "x.pt2", "--format", "safetensors"), 6, "safetensors ends in .safetensors"),
        (("bake", "model.pt", "-o", "x.safetensors", "--format", "module"), 6, "called like the format safetensors"),
        (("bake", "model.pt", "-o", "x.pt", "--example", "nonsense"), 2, "float32[2,3,8]"),
        (("bake", "model.pt", "-o", "model.pt", "--example", "nonsense"), 2, "float32[2,3,8]"),
        (("apply", "spec.yaml", "model.pt", "-o", "model.pt", "--example", "nonsense"), 2, "float32[2,3,8]"),
        (("apply", "missing.yaml", "model.pt", "-o", "model.pt"), 3, "no such file"),
        (("apply", "spec.yaml", "model.pt", "-o", "x.ts"), 6, "`reparam bake MODEL.pt -o x.ts`"),
        (("bake", "model.pt", "-o", "x.onx"), 6, "no format has the suffix .onx; did you mean '.onnx'?"),
        (("apply", "spec.yaml", "model.pt", "-o", "x.txt"), 6, "no format has the suffix .txt; they are .onnx, .pt"),
        (("bake", "model.pt", "-o", "x.pt", "--format", "onx"), 2, "'--format': 'onx' is not one of"),
        (("init", "model.pt"), 2, "Choose from:\n\tspectral-norm"),
        (("bake", "model.pt", "-o", "x.pt2", "--inputs", "model.pt"), 6, "model.pt has classes of its own"),
        (("bake", "model.pt", "--spec", "spec.yaml", "-o", "x.pt"), 2, "`reparam apply SPEC` writes"),
        (("plan", "shallow.yaml", "deep.pt"), 4, "`*` stands for one part of a name: did you mean '**.weight'?"),
        (("plan", "spec.yaml", "named.pt"), 6, "--allow argparse.Namespace (allow=['argparse.Namespace'] in Python)"),
        (("plan", "missing.yaml", "model.pt"), 3, "no such file"),
        (("plan", ".", "model.pt"), 3, "directory"),
        (("validate", "wrong.yaml"), 3, "wrong.yaml:3:"),
        (("plan", "nomatch.yaml", "model.pt"), 4, "nomatch.yaml:3:"),
        (("plan", "spec.yaml", "missing.pt"), 6, "does not exist"),
        (("plan", "spec.yaml", "spec.yaml"), 6, "no model file"),
        (("plan", "spec.yaml", "."), 6, "directory"),
        (("plan", "spec.yaml", "model.pt", "--model", "x"), 6, "package.module:factory"),
        (
            ("plan", "spec.yaml", "weights.pt", "--model", "torch.nn:Linear"),
            6,
            "Linear is called without arguments: missing a required",
        ),
        (("plan", "model.pt", "spec.yaml"), 3, "is this the model's file?"),
        (("plan", "foreign.yaml", "model.pt", "--allow-import", "json"), 3, "json has no 'Scale'"),
        (("bake", "model.pt", "-o", "nowhere/x.pt"), 6, "does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_bad_input_has_its_exit_code(refused, folder, arguments, code, message):
    (folder / "wrong.yaml").write_text("reparam: 1\nrules:\n  - {nam: a, select: '*', chain: [symmetric]}\n")
    (folder / "nomatch.yaml").write_text("reparam: 1\nrules:\n  - {name: a, select: 'x.y', chain: [symmetric]}\n")
    (folder / "foreign.yaml").write_text(
        "reparam: 1\nimports: {my: json}\nrules:\n  - {name: a, select: '*', chain: [my.Scale]}\n"
    )
    (folder / "shallow.yaml").write_text("reparam: 1\nrules:\n  - {name: a, select: '*.weight', chain: [symmetric]}\n")
    torch.save(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), folder / "deep.pt")
    torch.save(argparse.Namespace(), folder / "named.pt")
    torch.save(nn.Linear(4, 4).state_dict(), folder / "weights.pt")
    refused(arguments, code, message)


def test_no_arguments_print_the_help(reparam):
    result = reparam()
    assert result.code == 2
    assert "Usage: reparam" in result.out


def test_spec_diagnostics_are_json(reparam, folder):
    (folder / "wrong.yaml").write_text("reparam: 1\nrules:\n  - {nam: a, select: '*', chain: [symetric]}\n")
    problems = reparam("validate", "wrong.yaml", "--json").json["error"]["diagnostics"]
    assert len(problems) >= 2
    assert all(problem["file"] == "wrong.yaml" and problem["line"] == 3 for problem in problems)


def test_plan_diagnostics_are_json(reparam, folder):
    (folder / "nomatch.yaml").write_text("reparam: 1\nrules:\n  - {name: a, select: 'x.y', chain: [symmetric]}\n")
    error = reparam("plan", "nomatch.yaml", "model.pt", "--json").json["error"]
    assert [problem["line"] for problem in error["diagnostics"]] == [3]


def test_failed_numeric_check_writes_nothing(reparam, folder):
    (folder / "noise.yaml").write_text(
        "reparam: 1\nimports: {their: their_code}\nrules:\n"
        "  - {name: s, select: '0.weight', chain: [their.Noise], init: raw}\n"
    )
    options = ("--allow-import", "their_code", "--example", "float32[3,4]")
    result = reparam("apply", "noise.yaml", "model.pt", "-o", "out.pt", *options)
    assert result.code == 5
    assert "the rewritten model is not the model it should be" in result.err
    assert not (folder / "out.pt").exists()


def test_error_in_user_code_is_one_line(reparam, folder):
    torch.save(nn.Linear(4, 4).state_dict(), "weights.pt")
    result = reparam("plan", "spec.yaml", "weights.pt", "--model", "their_code:fail")
    assert result.code == 1
    assert "LookupError: the user's own mistake" in result.err
    debugged = reparam("plan", "spec.yaml", "weights.pt", "--model", "their_code:fail", "--debug")
    assert "Traceback" in debugged.err


def test_failing_parametrization_is_a_plan_error(reparam, folder):
    (folder / "broken.yaml").write_text(
        "reparam: 1\nimports: {their: their_code}\nrules:\n  - {name: s, select: '*.weight', chain: [their.Broken]}\n"
    )
    result = reparam("plan", "broken.yaml", "model.pt", "--allow-import", "their_code")
    assert result.code == 4
    assert "the user's own mistake" in result.err


def test_interrupt_leaves_no_file(reparam, folder, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    before = sorted(path.name for path in folder.iterdir())
    assert reparam("apply", "spec.yaml", "model.pt", "-o", "out.pt").code == 130
    assert sorted(path.name for path in folder.iterdir()) == before


@fuzzing
@given(content=st.binary(max_size=300))
def test_random_bytes_as_a_spec(reparam, folder, content):
    (folder / "random.yaml").write_bytes(content)
    result = reparam("plan", "random.yaml", "model.pt", "--json")
    assert result.code == 3
    assert json.loads(result.out)["error"]["diagnostics"]


@fuzzing
@given(start=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04"]), rest=st.binary(max_size=200))
def test_random_bytes_as_a_model(reparam, folder, start, rest):
    (folder / "random.pt").write_bytes(start + rest)
    assert reparam("plan", "spec.yaml", "random.pt").code == 6


@fuzzing
@given(arguments=st.lists(st.sampled_from(["apply", "bake", "plan", "--json", "-o", "spec.yaml", "model.pt", "--only",
                                            "", "x", "--force", "--dry-run", "--example", "[", "--keep"])))  # fmt: skip
def test_random_arguments(reparam, folder, arguments):
    assert reparam(*arguments).code in (0, 2, 3, 4, 6)
