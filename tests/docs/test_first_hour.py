"""The path of a newcomer, from a script with a model to a served file, with three typical mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 8)
        self.fc2 = nn.Linear(8, 2)
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.save(Net(), "net.pt")
"""
TRAINING = """
import torch, rewriter
from net_script import Net

spec = open("spec.yaml").read()
model = rewriter.rewrite(Net(), spec)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
rewriter.io.save_model(model, "trained.pt", force=True)
"""


def run(*arguments: str, code: int = 0) -> str:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == code, result.stdout + result.stderr
    assert code != 0 or "Traceback" not in result.stderr
    return result.stdout + result.stderr


def reparam(*arguments: str, code: int = 0) -> str:
    return run("-m", "rewriter", *arguments, code=code)


@pytest.mark.slow
def test_newcomer_reaches_a_served_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net_script.py").write_text(SCRIPT)
    run("net_script.py")

    # First mistake: the class is in the script. The message names the option.
    message = reparam("init", "net.pt", "--for", "spectral-norm", "-o", "spec.yaml", code=6)
    assert "--model script.py:Net" in message
    net = ("--model", "net_script.py:Net")
    reparam("init", "net.pt", "--for", "spectral-norm", "-o", "spec.yaml", *net)

    # Second mistake: a misspelt name. The message suggests the right one.
    spec = Path("spec.yaml").read_text()
    lines = spec.partition("rules:\n")[0] + "rules:\n  - {name: a, select: fc1.wieght, chain: [spectral_norm]}\n"
    Path("wrong.yaml").write_text(lines)
    assert "did you mean 'fc1.weight'" in reparam("plan", "wrong.yaml", "net.pt", *net, code=4)
    Path("spec.yaml").write_text(lines.replace("wieght", "weight"))
    assert "fc1.weight" in reparam("plan", "spec.yaml", "net.pt", *net)

    assert "1 tensor computed by 'spectral_norm'" in reparam("apply", "spec.yaml", "net.pt", "-o", "new.pt", *net)
    Path("train.py").write_text(TRAINING)
    run("train.py")

    # Third mistake: the output exists. The message names the option.
    Path("plain.ts").write_text("")
    assert "--force" in reparam("bake", "trained.pt", "-o", "plain.ts", *net, code=6)
    reparam("bake", "trained.pt", "-o", "plain.ts", "--force", *net)
    assert torch.jit.load("plain.ts")(torch.ones(1, 4)).shape == (1, 2)
