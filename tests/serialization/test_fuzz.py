"""Changed files, graphs and states at random: each ends in a model or in ModelFileError, and no code runs."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings

import pytest
import torch
from hostile import canary, graph_module, replaced, with_state, write
from torch import fx, nn

import rewriter
from rewriter.errors import ModelFileError
from rewriter.io import load_model, save_model
from rewriter.serialization import graph_to_data, restore_graph_module

SEEDS = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
RELU = nn.functional.relu
SPEC = {"reparam": 1, "rules": [{"name": "r", "select": "0.weight", "chain": ["symmetric"]}]}
OPCODES = b"().0NRbcdehijlopqrstu}]\x80\x81\x85\x86\x87\x88\x89X\x8aK"
NAMES = [
    b"builtins\neval",
    b"os\nsystem",
    b"builtins\ngetattr",
    b"torch\nload",
    b"torch\nrelu",
    b"torch.nn.functional\nrelu",
    b"torch.fx.graph_module\nGraphModule",
    b"torch.nn.modules.activation\nReLU",
    b"rewriter.serialization._save\nrestore_graph_module",
    b"rewriter.io\nonly_load_model_reads_this_graph",
    b"rewriter.sites._site\nReference",
    b"rewriter.cli.__main__\nmain",
]
WORDS = [
    *("x", "fc", "fc.weight", "fc.forward", "fc.__class__", "self", "torch", "output", "__import__", "training", ""),
    *("x\n    import this", "x = __import__('os')", "import", "*x", "torch.relu", "torch.load", "builtins.getattr"),
    *("builtins.eval", "operator.setitem", "math.sqrt", "os.system", "torch.ops.aten.add.Tensor", "apply_", "numpy"),
    *("call_function", "call_method", "call_module", "get_attr", "placeholder", "forward", "grad_fn", "shape", "T"),
    *("node", "tuple", "dict", "slice", "dtype", "device", "float32", "cpu", "function", "list", "size", "range"),
]
STATE_KEYS = [
    *("forward", "_forward_hooks", "_modules", "_parameters", "_buffers", "training", "_code", "_graph", "activation"),
    *("_non_persistent_buffers_set", "__class__", "__dict__", "_backward_hooks", "_call_impl", "in_features", "weight"),
]


def _models():
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.LSTM(3, 2))
    return {"plain": plain, "graph": fx.symbolic_trace(plain[:2]), "rewritten": rewriter.rewrite(plain[:2], SPEC)}


@pytest.fixture(scope="module", params=["plain", "graph", "rewritten"])
def content(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.pt"
    save_model(_models()[request.param], path)
    return path.read_bytes()


def read(path, content):
    """Read a file that may be anything."""
    path.write_bytes(content)
    with canary(), warnings.catch_warnings(), contextlib.suppress(ModelFileError):
        warnings.simplefilter("ignore")
        load_model(path)


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return `data` with a few bytes, opcodes or names changed."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(changed))
        action = draw.randrange(5)
        if action == 0:
            changed[place] = draw.randrange(256)
        elif action == 1:
            changed[place] = draw.choice(OPCODES)
        elif action == 2:
            del changed[place : place + draw.randint(1, 12)]
        elif action == 3:
            changed[place:place] = changed[draw.randrange(len(changed)) :][: draw.randint(1, 40)]
        else:
            starts = [index for index in range(len(changed)) if changed[index : index + 6] in (b"ctorch", b"crewri")]
            if starts:
                start = draw.choice(starts) + 1
                end = changed.index(b"\n", changed.index(b"\n", start) + 1)
                changed[start:end] = draw.choice(NAMES)
    return bytes(changed)


@SEEDS
def test_a_pickle_with_changed_opcodes_runs_nothing(tmp_path, content, seed):
    draw = random.Random(seed)
    for _ in range(100):
        read(tmp_path / "model.pt", replaced(content, lambda data: changed_bytes(data, draw)))


def test_an_archive_with_changed_bytes_runs_nothing(tmp_path, content):
    draw = random.Random(0)
    for _ in range(150):
        read(tmp_path / "model.pt", changed_bytes(content, draw))


def crossed(value, draw: random.Random):
    """Return plain data with a few items replaced by words, by each other, or removed."""
    if isinstance(value, dict):
        return {key: crossed(item, draw) for key, item in value.items() if draw.random() > 0.004}
    if isinstance(value, list):
        return [crossed(item, draw) for item in value if draw.random() > 0.004]
    if draw.random() < 0.02:
        return draw.choice(
            [*WORDS, None, 3, -1, [], {}, {"node": "x"}, {"function": nn.functional.relu}, {"list": [1]}]
        )
    return value


@SEEDS
def test_a_crafted_graph_runs_nothing(tmp_path, seed):
    draw = random.Random(seed)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x, *rest, gain=1.0):
            y = self.fc(x).relu() * gain + self.fc.weight.T[..., :3]
            return {"y": torch.cat([y, y], dim=-1), "shape": y.shape}

    data = graph_to_data(fx.symbolic_trace(Model()).graph)
    path = tmp_path / "model.pt"
    built = 0
    for _ in range(150):
        write(graph_module(crossed(copy.deepcopy(data), draw), fc=nn.Linear(3, 3)), path)
        with canary(), contextlib.suppress(ModelFileError):
            module = load_model(path)
            built += 1
            with contextlib.suppress(Exception):  # a graph may fail when it runs
                module(torch.ones(3, 3))
    assert built > 5


@SEEDS
def test_a_crafted_state_runs_nothing(tmp_path, seed):
    draw = random.Random(seed)
    for _ in range(100):
        layer = nn.Linear(3, 3)
        plain = [*WORDS[:8], None, 3, [], {}, torch.ones(3), {"weight": torch.ones(3, 3)}, [[None]] * 3]
        callables = [RELU, {0: RELU}, nn.ReLU(), {"a": nn.ReLU()}, nn.ReLU, restore_graph_module]
        value = draw.choice([*plain, *callables])
        model = nn.Sequential(with_state(layer, **{draw.choice(STATE_KEYS): value}), nn.ReLU())
        write(model, tmp_path / "model.pt")
        with canary(), contextlib.suppress(ModelFileError):
            loaded = load_model(tmp_path / "model.pt")
            assert not callable(vars(loaded[0]).get("forward"))
