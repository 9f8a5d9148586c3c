"""Adapters of PEFT merged into a checkpoint, against PEFT's own merge; and adapters written for PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewriter import ModelFileError, PlanError, RewriterError, rewrite
from rewriter.io import save_adapter
from rewriter.streaming import merge_checkpoint
from rewriter.streaming._checkpoint import read_rows
from rewriter.streaming._header import read_header
from tests.cli.conftest import reparam as reparam
from tests.streaming.conftest import assert_equal, contiguous, read_folder, spec, write_folder

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The following alpha_pattern:RuntimeWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.block = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
        self.head = nn.Linear(16, 3)
        self.cls = nn.Linear(3, 2)

    def forward(self, i: Tensor) -> Tensor:
        hidden: Tensor = self.block(self.emb(i))
        return self.cls(self.head(self.conv(hidden[:, None]).mean(2).flatten(1)))  # type: ignore[no-any-return]


X = torch.arange(6).reshape(2, 3)
ALL = ["emb", "conv", "block.0", "block.1", "head"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL},
    "rslora": {"use_rslora": True, "target_modules": ["block.0"]},
    "dora": {"use_dora": True, "target_modules": ["block.0", "block.1", "conv"]},
    "saved": {"modules_to_save": ["cls"], "target_modules": ["head"]},
    "patterns": {
        "target_modules": ["block.0", "block.1", "head"],
        "rank_pattern": {"block.0": 3},
        "alpha_pattern": {"^head": 1},
    },
    "bias": {"bias": "lora_only", "target_modules": ["block.0"]},
}


def adapted(base: nn.Module, seed: int, **config: Any) -> Any:
    """Return a PEFT model over a copy of `base`, with all its adapter's tensors moved."""
    copied = Net().to(next(base.parameters()).dtype)
    copied.load_state_dict(base.state_dict())
    model = peft.get_peft_model(copied, peft.LoraConfig(r=2, lora_alpha=3, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter.dtype))
    return model.eval()


def in_shards(tmp_path: Path, base: nn.Module) -> Path:
    state = base.state_dict()
    names = list(state)
    return write_folder(tmp_path / "base", [{name: state[name] for name in names[start::3]} for start in range(3)])


@pytest.mark.parametrize("config", CONFIGS)
def test_merging_gives_what_pefts_merge_gives(config: str, tmp_path: Path) -> None:
    base = Net()
    model = adapted(base, 1, **CONFIGS[config])
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(in_shards(tmp_path, base), [tmp_path / "adapter"], tmp_path / "out")
    wanted = contiguous(model.merge_and_unload().state_dict())
    torch.testing.assert_close(read_folder(tmp_path / "out"), wanted, rtol=1e-6, atol=1e-7)
    changed = [name for name, tensor in wanted.items() if not torch.equal(tensor, base.state_dict()[name])]
    assert changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_adapter", [None, torch.float32])
def test_half_precision_is_rounded_as_peft_rounds(
    dtype: torch.dtype, of_adapter: torch.dtype | None, tmp_path: Path
) -> None:
    base = Net().to(dtype)
    model = adapted(base, 1, target_modules=["block.0", "head"])
    if of_adapter is None:
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(in_shards(tmp_path, base), [tmp_path / "adapter"], tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), contiguous(model.merge_and_unload().state_dict()))


def test_several_adapters_are_added_with_their_weights(tmp_path: Path) -> None:
    base = Net()
    models = [adapted(base, seed, target_modules=["block.0", "head"]) for seed in (1, 2)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / f"adapter{number}")
    folders = [tmp_path / "adapter0", tmp_path / "adapter1"]
    merge_checkpoint(in_shards(tmp_path, base), folders, tmp_path / "out", weights=[1.0, 0.5])
    one, two = (model.merge_and_unload().state_dict() for model in models)
    before = base.state_dict()
    wanted = {name: tensor + (one[name] - tensor) + 0.5 * (two[name] - tensor) for name, tensor in before.items()}
    torch.testing.assert_close(read_folder(tmp_path / "out"), wanted)


def test_the_command_merges(reparam: Any, tmp_path: Path) -> None:
    base = Net()
    model = adapted(base, 1, target_modules=["head"])
    model.save_pretrained(tmp_path / "adapter")
    folder = in_shards(tmp_path, base)
    done = reparam("merge", folder, tmp_path / "adapter", "-o", tmp_path / "out", "--weights", "1.0", "--json")
    assert done.json["merged"] == ["head.weight"]
    torch.testing.assert_close(read_folder(tmp_path / "out"), contiguous(model.merge_and_unload().state_dict()))
    assert reparam("merge", folder, tmp_path / "adapter", "-o", tmp_path / "b", "--weights", "1,2").code == 2
    assert reparam("merge", folder, tmp_path / "adapter", "-o", tmp_path / "b", "--weights", "much").code == 2
    assert reparam("merge", folder, tmp_path / "base", "-o", tmp_path / "b").code == 6


def changed_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
    ],
    ids=str,
)
def test_other_kinds_of_adapters_are_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = Net()
    adapted(base, 1, target_modules=["head"]).save_pretrained(tmp_path / "adapter")
    changed_config(tmp_path / "adapter", **settings)
    with pytest.raises(ModelFileError, match=message):
        merge_checkpoint(in_shards(tmp_path, base), [tmp_path / "adapter"], tmp_path / "out")


def test_what_does_not_fit_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    base = Net()
    folder = in_shards(tmp_path, base)
    adapted(base, 1, **CONFIGS["saved"]).save_pretrained(tmp_path / "saved")
    adapted(base, 1, **CONFIGS["dora"]).save_pretrained(tmp_path / "dora")
    adapted(base, 1, target_modules=["block.0", "head"]).save_pretrained(tmp_path / "plain")
    with pytest.raises(PlanError, match=r"cls\.weight.*modules_to_save.*no weight 0\.5"):
        merge_checkpoint(folder, [tmp_path / "saved"], tmp_path / "out", weights=[0.5])
    with pytest.raises(PlanError, match=r"block\.0\.weight.*DoRA.*changes it too"):
        merge_checkpoint(folder, [tmp_path / "dora", tmp_path / "plain"], tmp_path / "out")
    save_file({"head.weight": torch.randn(3, 15)}, tmp_path / "other.safetensors")
    with pytest.raises(PlanError) as refused:
        merge_checkpoint(tmp_path / "other.safetensors", [tmp_path / "plain"], tmp_path / "out.safetensors")
    assert "block.0.weight: " in str(refused.value) and "no such tensor" in str(refused.value)
    assert "head.weight: the adapter has A [2, 16] and B [3, 2], and the base [3, 15]" in str(refused.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()


CHAINS: dict[str, tuple[str, str]] = {
    "lora": ("{block.*,head,emb,conv}.weight", "{r: 2, lora_alpha: 3}"),
    "rslora": ("block.*.weight", "{r: 2, use_rslora: true}"),
    "dora": ("{block.0,head,conv}.weight", "{r: 2}"),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_peft_loads_a_written_adapter_with_equal_outputs(kind: str, tmp_path: Path) -> None:
    select, arguments = CHAINS[kind]
    name = "dora" if kind == "dora" else "lora"
    rules = f"reparam: 1\nrules:\n  - {{name: a, select: '{select}', chain: [{name}: {arguments}]}}\n"
    base = Net().eval()
    model = rewrite(base, rules)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora" in key or "magnitude" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(X), model(X))
    assert not torch.equal(theirs(X), Net.forward(theirs.unload(), X))


def test_ranks_and_scales_that_differ_go_into_patterns(tmp_path: Path) -> None:
    rules = {
        "reparam": 1,
        "rules": [
            {"name": "a", "select": "block.*.weight", "chain": [{"lora": {"r": 2}}]},
            {"name": "b", "select": "head.weight", "chain": [{"lora": {"r": 3, "lora_alpha": 5}}]},
        ],
    }
    model = rewrite(Net(), rules)
    save_adapter(model, tmp_path / "adapter", base="the/base")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (2, {"^head": 3}, {"^head": 5})
    assert config["base_model_name_or_path"] == "the/base"
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert tensors["base_model.model.head.lora_A.weight"].shape == (3, 16)
    with pytest.raises(ModelFileError, match="force"):
        save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("chain", [["symmetric"], [{"lora": {"r": 2}}, {"scale": {"factor": 2.0}}]], ids=str)
def test_chains_that_peft_does_not_have_are_refused(chain: list[Any], tmp_path: Path) -> None:
    model = rewrite(nn.Sequential(nn.Linear(4, 4)), spec(*chain, select="0.weight"))
    with pytest.raises(RewriterError, match=r"0\.weight: .* is no LoRA or DoRA"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_with_another_base_is_refused(tmp_path: Path) -> None:
    chain = {"lora": {"r": 2, "init_lora_weights": "pissa"}}
    model = rewrite(nn.Sequential(nn.Linear(4, 4)), spec(chain, select="0.weight"))
    with pytest.raises(RewriterError, match="its base is not the plain model's"):
        save_adapter(model, tmp_path / "adapter")


class Experts(nn.Module):
    """Stacked weights of experts, as transformers has them; `transposed` are those of which the input comes first."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 6, 4) / 4)
        self.down = nn.Parameter(torch.randn(3, 4, 3) / 4)


class Mixture(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)
        self.experts = Experts(transposed)


def targeted(base: nn.Module, folder: Path, *names: str) -> Any:
    """Save an adapter of the parameters `names`, and return its model."""
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=[],
        target_parameters=list(names),
        alpha_pattern={"experts.up": 5},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("transposed", [False, True])
def test_adapters_of_parameters_are_merged_as_peft_merges_them(transposed: bool, tmp_path: Path) -> None:
    base = Mixture(transposed)
    before = contiguous(base.state_dict())
    folder = in_shards(tmp_path, base)
    model = targeted(base, tmp_path / "adapter", "experts.up", "experts.down", "head.weight")
    merge_checkpoint(folder, [tmp_path / "adapter"], tmp_path / "out")
    wanted = contiguous(model.merge_and_unload().state_dict())
    torch.testing.assert_close(read_folder(tmp_path / "out"), wanted, rtol=1e-6, atol=1e-7)
    assert [name for name in wanted if torch.equal(wanted[name], before[name])] == ["head.bias"]


def test_parameters_that_shapes_do_not_tell_apart_are_refused(tmp_path: Path) -> None:
    base = Mixture(False)
    base.experts.down = nn.Parameter(torch.randn(3, 6, 4))
    folder = in_shards(tmp_path, base)
    targeted(base, tmp_path / "adapter", "experts.up", "experts.down")
    with pytest.raises(PlanError, match=r"experts\.\*: .* \(target_parameters\), and names and shapes do not tell"):
        merge_checkpoint(folder, [tmp_path / "adapter"], tmp_path / "out")
    square = Mixture(False)
    square.experts.up = nn.Parameter(torch.randn(3, 6, 6))
    folder = in_shards(tmp_path / "square", square)
    targeted(square, tmp_path / "square/adapter", "experts.up")
    with pytest.raises(PlanError, match="its experts are square"):
        merge_checkpoint(folder, [tmp_path / "square/adapter"], tmp_path / "out")


@pytest.mark.parametrize("alpha", [4, 3], ids=["power of two", "other"])
def test_a_tensor_in_many_blocks_is_merged_as_peft_merges_it(
    alpha: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rewriter.streaming._checkpoint.BLOCK", 1)
    base = nn.Sequential(nn.Linear(96, 1000, bias=False), nn.Embedding(1000, 96))
    blocks = [(first, len(rows)) for first, rows in read_rows(read_header(written(tmp_path, base)).tensors[0])]
    assert blocks[:2] == [(0, 32), (32, 32)] and len(blocks) == 32  # 32 rows of 384 bytes are three pages
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["0", "1"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "in.safetensors", [tmp_path / "adapter"], tmp_path / "out.safetensors")
    torch.testing.assert_close(
        load_file(tmp_path / "out.safetensors"), contiguous(model.merge_and_unload().state_dict()), rtol=1e-6, atol=1e-7
    )


def written(folder: Path, model: nn.Module) -> Path:
    save_file(contiguous(model.state_dict()), folder / "in.safetensors")
    return folder / "in.safetensors"
