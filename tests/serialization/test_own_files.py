"""Files that reparam wrote itself: read without trust in a fresh process, graphs as data, chains and all."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import rewriter
from rewriter.errors import ModelFileError
from rewriter.io import load_model, save_model

CHECKOUT = Path(__file__).parents[2]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(2, 4)
        self.head = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)
        self.head.weight = self.cell.weight_hh

    def forward(self, x):
        state = x.new_zeros(x.shape[0], 4)
        for step in range(3):
            state = self.cell(x[:, step], state)
        return self.out(self.head(state))


MODELS = {
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "**.weight", (2, 4)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten()), "0.weight", (1, 2, 3, 3)),
    "module mode": (lambda: nn.LSTM(4, 4), "weight_hh_l0", (2, 3, 4)),
}
CHAINS = {
    "sequential": ["symmetric", {"orthogonal": {"map": "cayley"}}],
    "convolution": ["weight_norm"],
    "module mode": ["spectral_norm"],
}


def _rewritten(name):
    make, select, shape = MODELS[name]
    torch.manual_seed(0)
    spec = {"reparam": 1, "rules": [{"name": "r", "select": select, "chain": CHAINS[name]}]}
    return make(), rewriter.rewrite(make(), spec).eval(), torch.randn(shape)


def _tensor(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", MODELS)
def test_a_rewritten_model_is_read_and_baked_without_trust(name, tmp_path):
    plain, new, x = _rewritten(name)
    save_model(new, tmp_path / "new.pt")
    read = load_model(tmp_path / "new.pt")
    assert list(read.state_dict()) == list(new.state_dict())
    assert torch.equal(_tensor(read(x)), _tensor(new(x)))
    baked = rewriter.bake(read)
    assert type(baked) is type(plain)
    assert list(baked.state_dict()) == list(plain.state_dict())
    assert torch.allclose(_tensor(baked(x)), _tensor(new(x)), atol=1e-6)


@pytest.mark.slow
def test_a_fresh_process_reads_the_same_outputs(tmp_path):
    _, new, x = _rewritten("sequential")
    save_model(new, tmp_path / "new.pt")
    torch.save((x, new(x).detach()), tmp_path / "expected.pt")
    script = (
        "import torch, rewriter\nfrom rewriter.io import load_model\n"
        "x, expected = torch.load('expected.pt')\nmodel = load_model('new.pt')\n"
        "assert torch.equal(model(x), expected)\n"
        "assert torch.allclose(rewriter.bake(model)(x), expected, atol=1e-6)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_source_code_is_in_the_file(tmp_path):
    _, new, _ = _rewritten("sequential")
    assert isinstance(new, fx.GraphModule)
    save_model(new, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as archive:
        pickle = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert b"def forward" not in pickle
    assert b"reduce_graph_module" not in pickle


def test_the_class_that_comes_back_has_to_be_allowed(tmp_path):
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "cell.weight_hh", "chain": ["symmetric"]}]}
    model = Recurrent()
    new = rewriter.rewrite(model, spec)
    sys.modules.setdefault(Recurrent.__module__, sys.modules[__name__])
    save_model(new, tmp_path / "new.pt")
    name = f"{Recurrent.__module__}.Recurrent"
    with pytest.raises(ModelFileError, match=f"--allow {name}"):
        load_model(tmp_path / "new.pt")
    baked = rewriter.bake(load_model(tmp_path / "new.pt", allow=[name]))
    assert type(baked) is Recurrent
    assert baked.head.weight is baked.cell.weight_hh
    x = torch.randn(2, 3, 2)
    assert torch.allclose(baked(x), new(x), atol=1e-6)


def test_a_baked_graph_module_is_data_too(tmp_path):
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "0.weight", "chain": ["symmetric"]}]}
    baked = rewriter.bake(rewriter.rewrite(module, spec))
    save_model(baked, tmp_path / "baked.pt")
    assert load_model(tmp_path / "baked.pt").code == module.code
