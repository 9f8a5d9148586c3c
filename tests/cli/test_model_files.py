"""Model files as people have them: saved from a script, training checkpoints, prefixes, folders."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import rewriter
from rewriter.io import load_model

SCRIPT = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
    def forward(self, x):
        return self.fc(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
    def forward(self, x):
        return self.block(x)

class Other:
    pass

if __name__ == "__main__":
    torch.save(Net(), "net.pt")
    torch.save(Net().state_dict(), "weights.pt")
    odd = Net()
    odd.other = Other()
    torch.save(odd, "odd.pt")
"""


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with a script and the files that it saved."""
    place = tmp_path_factory.mktemp("saved")
    (place / "train_net.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "train_net.py"], check=True, timeout=100, cwd=place)
    return place


@pytest.fixture
def script(folder, saved):
    for file in saved.iterdir():
        shutil.copy(file, folder)
    (folder / "net.yaml").write_text("reparam: 1\nrules:\n  - {name: a, select: block.fc.weight, chain: [symmetric]}\n")
    yield folder
    sys.modules.pop("train_net", None)


def test_module_saved_by_a_script_asks_for_the_script(reparam, script):
    for options in ((), ("--trust",), ("--allow", "__main__.Net", "--allow", "__main__.Block")):
        result = reparam("inspect", "net.pt", *options)
        assert result.code == 6
        assert "defines __main__.Block, __main__.Net" in result.err
        assert "--model script.py:" in result.err


def test_module_saved_by_a_script_loads_rewrites_and_bakes(reparam, script):
    named = ("--model", "train_net.py:Net")
    assert "block.fc.weight" in reparam("inspect", "net.pt", *named).out
    assert reparam("apply", "net.yaml", "net.pt", "-o", "new.pt", *named).code == 0
    baked = reparam("bake", "new.pt", "-o", "plain.pt", *named)
    assert baked.code == 0, baked.err
    plain = reparam("inspect", "plain.pt", "--json", *named).json
    assert plain["class"] == "Net"
    assert not {"Net", "Block"} & vars(sys.modules["__main__"]).keys()


def test_script_makes_the_module_for_weights(reparam, script):
    assert reparam("plan", "net.yaml", "weights.pt", "--model", "train_net.py:Net").code == 0


def test_script_allows_its_module_classes_only(reparam, script):
    result = reparam("inspect", "odd.pt", "--model", "train_net.py:Net")
    assert result.code == 6
    assert "__main__.Other" in result.err and "__main__.Net\n" not in result.err


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("train_net.py:Nett", "train_net.py has no 'Nett'; did you mean 'Net'?"),
        ("missing.py:Net", "missing.py cannot be read"),
        ("json.py:Net", "json.py cannot be imported: its name 'json' is the name of another module"),
    ],
)
def test_script_that_does_not_fit_is_refused(refused, script, factory, message):
    __import__("json")
    refused(("inspect", "net.pt", "--model", factory), 6, message)


def weights(prefix=""):
    return {f"{prefix}{name}": tensor for name, tensor in nn.Sequential(nn.Linear(4, 4)).state_dict().items()}


MADE = ("--model", "their_code:make", "--json")


@pytest.mark.parametrize("key", ["model", "state_dict", "net"])
def test_model_of_a_training_checkpoint_is_found(reparam, folder, key):
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters()).state_dict()
    torch.save({key: weights(), "optimizer": optimizer, "epoch": 3}, "checkpoint.pt")
    result = reparam("plan", "spec.yaml", "checkpoint.pt", *MADE)
    assert result.code == 0, result.err


def test_key_chooses_one_of_several_models(reparam, folder):
    torch.save({"net": weights(), "ema": weights()}, "checkpoint.pt")
    result = reparam("plan", "spec.yaml", "checkpoint.pt", *MADE)
    assert result.code == 6
    assert "several state dicts: 'net', 'ema'; choose one with --key" in result.err
    assert reparam("plan", "spec.yaml", "checkpoint.pt", "--key", "ema", *MADE).code == 0
    wrong = reparam("plan", "spec.yaml", "checkpoint.pt", "--key", "mea", *MADE)
    assert wrong.code == 6
    assert "no entry 'mea'; its keys are 'net', 'ema'" in wrong.err


def test_key_chooses_a_whole_module(reparam, folder):
    torch.save({"net": nn.Sequential(nn.Linear(4, 4)), "epoch": 1}, "checkpoint.pt")
    assert reparam("plan", "spec.yaml", "checkpoint.pt", "--key", "net").code == 0


@pytest.mark.parametrize(
    ("prefix", "named"),
    [("module.", ["module."]), ("_orig_mod.", ["_orig_mod."]), ("_orig_mod.module.", ["module.", "_orig_mod."])],
)
def test_prefix_of_a_wrapper_is_removed_with_a_warning(reparam, folder, prefix, named):
    torch.save(weights(prefix), "weights.pt")
    result = reparam("plan", "spec.yaml", "weights.pt", *MADE)
    assert result.code == 0, result.err
    for one in named:
        assert f"warning: removed the prefix '{one}'" in result.err
    assert "from 2 names" in result.err


def test_prefix_inside_a_name_is_removed(folder):
    torch.save({"0._orig_mod.weight": torch.ones(4, 4), "0._orig_mod.bias": torch.ones(4)}, "weights.pt")
    with pytest.warns(UserWarning, match="'_orig_mod.' of torch.compile from 2 names"):
        model = load_model("weights.pt", model=lambda: nn.Sequential(nn.Linear(4, 4)))
    assert torch.equal(model[0].weight, torch.ones(4, 4))


def test_child_called_module_is_no_prefix(folder, recwarn):
    def make():
        return nn.ModuleDict({"module": nn.Linear(4, 4)})

    made = make()
    torch.save(made.state_dict(), "weights.pt")
    loaded = load_model("weights.pt", model=make)
    assert torch.equal(loaded["module"].weight, made["module"].weight)
    assert not [warning for warning in recwarn if "prefix" in str(warning.message)]


def test_folder_is_refused_with_the_model_files_in_it(refused, folder):
    (folder / "empty").mkdir()
    refused(("inspect", "."), 6, ". is a directory; name a model file in it: model.pt")
    refused(("inspect", "empty"), 6, "empty is a directory without a model file")


def test_a_checkpoint_of_a_rewritten_model_is_loaded_by_its_spec(reparam, folder):
    plain = nn.Sequential(nn.Linear(4, 4))
    spec = (folder / "spec.yaml").read_text()
    trained = rewriter.rewrite(plain, spec)
    with torch.no_grad():
        trained.get_parameter("0.parametrizations.weight.original").mul_(3)
    torch.save({"model": trained.state_dict(), "epoch": 2}, "checkpoint.pt")
    refused = reparam("bake", "checkpoint.pt", "-o", "plain.pt", "--model", "their_code:make")
    assert refused.code == 6
    assert "weights of a rewritten model: `reparam apply SPEC checkpoint.pt -o OUT`" in refused.err
    done = reparam("apply", "spec.yaml", "checkpoint.pt", "-o", "new.pt", "--model", "their_code:make")
    assert done.code == 0, done.err
    assert "present" in done.err
    torch.testing.assert_close(rewriter.bake(load_model("new.pt"))[0].weight, rewriter.bake(trained)[0].weight)
    (folder / "other.yaml").write_text(spec.replace("symmetric", "orthogonal"))
    other = reparam("plan", "other.yaml", "checkpoint.pt", "--model", "their_code:make")
    assert other.code == 6
    assert "fit neither the model nor the one that the spec makes of it" in other.err


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", ["plain", "rewritten", "torch", "old"])
def test_bake_takes_a_checkpoint_with_its_spec_and_a_plain_factory(reparam, folder, form, prefix):
    spec = (folder / "spec.yaml").read_text().replace("symmetric", "weight_norm")
    (folder / "spec.yaml").write_text(spec)
    source = nn.Sequential(nn.Linear(4, 4))
    if form == "rewritten":
        source = rewriter.rewrite(source, spec)
    elif form != "plain":
        (nn.utils.weight_norm if form == "old" else nn.utils.parametrizations.weight_norm)(source[0])
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save({"model": state, "epoch": 2}, "checkpoint.pt")
    x = torch.randn(3, 4)
    done = reparam("bake", "checkpoint.pt", "--spec", "spec.yaml", "-o", "plain.pt", *MADE)
    assert done.code == 0, done.err
    assert done.json["baked"] == ["0.weight"]
    torch.testing.assert_close(load_model("plain.pt")(x), source(x))


def test_bake_takes_no_checkpoint_of_another_chain(reparam, refused, folder):
    plain = nn.Sequential(nn.Linear(4, 4))
    spec = (folder / "spec.yaml").read_text()
    torch.save(rewriter.rewrite(plain, spec.replace("symmetric", "skew")).state_dict(), "checkpoint.pt")
    call = ("bake", "checkpoint.pt", "--spec", "spec.yaml", "-o", "plain.pt")
    other = reparam(*call, "--model", "their_code:make")
    assert other.code == 6
    assert "saved from the chain skew, and the model computes symmetric" in other.err
    refused(call, 2, "say whose weights checkpoint.pt holds")
    assert not (folder / "plain.pt").exists()
