"""The first spec: `reparam init` and `reparam recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from torch import nn

from rewriter import load_spec, rewrite
from rewriter.cli._init import Job

CHECKOUT = Path(__file__).parents[2]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


MODELS = {
    "dense": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
    "convolutional": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2)),
    "recurrent": lambda: nn.ModuleList([nn.LSTM(3, 4, num_layers=2), nn.GRUCell(3, 4), nn.RNN(3, 4), nn.Linear(4, 2)]),
    "attention": Attention,
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "tied": Tied,
    "convolutions only": lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv3d(4, 4, 1)),
}
IMPOSSIBLE = {("convolutions only", "lora")}


@pytest.mark.parametrize(
    ("kind", "job"),
    [
        pytest.param(kind, job, marks=() if kind == "dense" or index == number % 5 else pytest.mark.slow)
        for number, kind in enumerate(MODELS)
        for index, job in enumerate(get_args(Job))
    ],
)
def test_starter_spec_validates_and_plans_on_its_model(reparam, folder, job, kind):
    model = MODELS[kind]()
    torch.save(model.state_dict(), "weights.pt")
    (folder / "their_code.py").write_text(
        f"def make():\n    from tests.cli.test_starting import MODELS\n    return MODELS[{kind!r}]()\n"
    )
    named = ("weights.pt", "--model", "their_code:make")
    made = reparam("init", *named, "--for", job, "-o", "new.yaml")
    if (kind, job) in IMPOSSIBLE:
        assert made.code == 4
        assert f"no tensor for --for {job}" in made.err
        return
    assert made.code == 0, made.err
    assert reparam("validate", "new.yaml").code == 0
    planned = reparam("plan", "new.yaml", *named, "--json")
    assert planned.code == 0, planned.err
    assert planned.json["sites"]
    assert len(rewrite(model, (folder / "new.yaml").read_text()).state_dict()) >= len(model.state_dict())
    assert Path("new.yaml").read_text().startswith("# ")
    assert "# Check it:  reparam plan new.yaml weights.pt --model their_code:make\n" in Path("new.yaml").read_text()


def test_next_command_names_the_model_and_its_options(reparam, folder):
    torch.save({"net": nn.Linear(4, 4).state_dict(), "more": nn.Linear(4, 4).state_dict()}, "weights of mine.pt")
    (folder / "made_here.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(4, 4)\n")
    options = ("--model", "made_here:make", "--key", "net", "--allow", "made_here.*")
    result = reparam("init", "weights of mine.pt", "--for", "prune", "-o", "new.yaml", *options)
    assert (
        "next: reparam plan new.yaml 'weights of mine.pt' --model made_here:make --key net --allow 'made_here.*'"
        in result.err
    )


def test_starter_spec_is_printed_without_an_output(reparam, folder):
    printed = reparam("init", "model.pt", "--for", "prune")
    assert printed.code == 0
    assert yaml.safe_load(printed.out)["reparam"] == 1
    assert "2 tensors: 0.weight, 2.weight" in printed.out
    assert reparam("init", "model.pt", "--for", "prune", "--json").json["text"] == printed.out


def test_starter_spec_for_a_rewritten_model_is_refused(reparam, folder):
    reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt")
    result = reparam("init", "rewritten.pt", "--for", "prune")
    assert result.code == 4
    assert "0.weight, 2.weight: already computed by a chain; bake the model first" in result.err


def test_recurrent_gates_get_a_matrix_each(reparam, folder):
    torch.save(nn.LSTM(3, 4), "lstm.pt")
    text = reparam("init", "lstm.pt", "--for", "orthogonal").out
    weight = rewrite(nn.LSTM(3, 4), text).weight_hh_l0
    for gate in weight.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(4))


def test_recipes_are_the_specs_of_the_checkout(reparam, folder):
    specs = {path.stem: path.read_text() for path in (CHECKOUT / "specs").glob("*.yaml")}
    assert reparam("recipes", "--json").json["recipes"].keys() == specs.keys()
    listed = reparam("recipes").out
    assert "sparse_transformer   2:4 sparse transformer" in listed
    for name, text in specs.items():
        assert reparam("recipes", name).out == text
    assert reparam("recipes", "spectral_gan", "-o", "-").out == specs["spectral_gan"]


def test_recipe_is_copied_and_never_overwrites(reparam, folder):
    assert reparam("recipes", "spectral_gan", "-o", "gan.yaml").code == 0
    assert load_spec("gan.yaml").rules[0].name == "layers"
    (folder / "gan.yaml").write_text("mine")
    refused = reparam("recipes", "spectral_gan", "-o", "gan.yaml")
    assert (refused.code, (folder / "gan.yaml").read_text()) == (6, "mine")
    assert reparam("recipes", "spectral_gan", "-o", "gan.yaml", "--force").code == 0


def test_unknown_recipe_names_the_recipes(refused):
    refused(("recipes", "gan"), 2, "there is no recipe 'gan'; the recipes are fake_quant_cnn")
    refused(("recipes", "-o", "x.yaml"), 2, "name the recipe to copy")


def test_built_package_contains_the_recipes(tmp_path):
    build = pytest.importorskip("setuptools.build_meta")
    import os
    import shutil
    import zipfile

    source = tmp_path / "source"
    shutil.copytree(CHECKOUT / "rewriter", source / "rewriter", symlinks=True, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copytree(CHECKOUT / "specs", source / "specs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source / name)
    before = os.getcwd()
    os.chdir(source)
    try:
        wheel = build.build_wheel(str(tmp_path))
    finally:
        os.chdir(before)
    names = zipfile.ZipFile(tmp_path / wheel).namelist()
    assert "rewriter/cli/starters.yaml" in names
    assert {Path(name).name for name in names if name.startswith("rewriter/recipes/")} == {
        path.name for path in (CHECKOUT / "specs").glob("*.yaml")
    }
