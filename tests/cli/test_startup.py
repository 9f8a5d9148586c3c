"""The start of the command: fast, and independent of other modules on the path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

CHECKOUT = Path(__file__).parents[2]


def _run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), **environment}
    return subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=60, cwd="/")


def test_help_does_not_import_torch():
    script = (
        "import sys\n"
        "from rewriter.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)\n"
    )
    for arguments in (["--help"], ["apply", "--help"], ["frobnicate"]):
        result = _run([sys.executable, "-c", script, *arguments])
        assert result.stderr.splitlines()[-1] == "False False"


def test_checkout_runs_with_python_cli_py():
    result = _run([sys.executable, str(CHECKOUT / "cli.py"), "--help"], PYTHONPATH="")
    assert result.returncode == 0
    assert "reparam" in result.stdout


def test_foreign_cli_module_is_not_imported(tmp_path):
    (tmp_path / "cli.py").write_text("raise SystemExit('this is the user own cli.py')\n")
    script = "from rewriter.cli import main; main(['--help'])"
    result = _run([sys.executable, "-c", script], PYTHONPATH=f"{tmp_path}{os.pathsep}{CHECKOUT}")
    assert result.returncode == 0, result.stderr


def test_package_has_no_top_level_cli_module():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["reparam"] == "rewriter.cli:main"
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["rewriter*"]
    assert "py-modules" not in project["tool"]["setuptools"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("reparam re", ["recipes", "report"]),
        ("reparam recipes spectral_g", ["spectral_gan"]),
        ("reparam catalog orth", ["orthogonal"]),
        ("reparam explain spec.yaml model.pt 0.", ["0.weight", "0.bias"]),
        ("reparam explain spec.yaml missing.pt 0.", []),
        ("reparam explain spec.yaml shards a.", ["a.weight"]),
        ("reparam bake new.pt --only e", ["even"]),
        ("reparam bake new.pt --only 0.", ["0.weight"]),
    ],
)
def test_completion_of_commands_tensors_rules_and_catalog_names(reparam, folder, monkeypatch, line, words):
    if "new.pt" in line:
        assert reparam("apply", "spec.yaml", "model.pt", "-o", "new.pt").code == 0
    if "shards" in line:
        (folder / "shards").mkdir()
        save_file({"a.weight": torch.ones(4, 4)}, folder / "shards" / "model.safetensors")
    monkeypatch.setenv("_REPARAM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    assert reparam().out.split() == words
