"""Adapter folders that PEFT saved, loaded onto rewritten models: the outputs are PEFT's."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, rewrite
from rewriter.errors import ModelFileError
from rewriter.io import load_model, read_adapter
from rewriter.state import convert_state_dict

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:fan_in_fan_out", "ignore:Could not find a")
X = torch.tensor([[1, 2, 0], [3, 4, 6]])


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 6)
        self.across = transformers.pytorch_utils.Conv1D(6, 6)
        self.conv = nn.Conv1d(6, 5, 2)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.across(torch.tanh(self.fc(self.embed(x)))))
        return self.head(self.conv(hidden.mT).mT)


def new_net() -> Net:
    torch.manual_seed(3)
    return Net()


def saved(folder: Path, base: nn.Module, **config: Any) -> nn.Module:
    """Save an adapter of random numbers for `base` and return PEFT's model."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.1 if "magnitude" in name else 0.5))
    model.save_pretrained(folder)
    return model.eval()


def rules(*chains: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    listed = [{"name": f"r{i}", "select": select, "chain": [step]} for i, (select, step) in enumerate(chains)]
    return {"reparam": 1, "rules": listed}


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


LORA = {"r": 2, "lora_alpha": 6}
CASES: dict[str, tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]] = {
    "lora": ({"target_modules": ["fc", "conv"]}, [("{fc,conv}.weight", {"lora": LORA})]),
    "rslora": (
        {"target_modules": ["fc", "conv"], "use_rslora": True},
        [("{fc,conv}.weight", {"lora": {**LORA, "use_rslora": True}})],
    ),
    "dora": ({"target_modules": ["fc", "conv"], "use_dora": True}, [("{fc,conv}.weight", {"dora": LORA})]),
    "transposed": (
        {"target_modules": ["embed", "across"], "fan_in_fan_out": True},
        [("{embed,across}.weight", {"lora": LORA})],
    ),
    "patterns": (
        {"target_modules": ["fc", "conv"], "rank_pattern": {"fc": 3}, "alpha_pattern": {"^conv": 5}},
        [("fc.weight", {"lora": {"r": 3, "lora_alpha": 6}}), ("conv.weight", {"lora": {"r": 2, "lora_alpha": 5}})],
    ),
    "saved modules": (
        {"target_modules": ["fc"], "modules_to_save": ["head"], "bias": "lora_only"},
        [("fc.weight", {"lora": LORA}), ("head.weight", {"affine": {"a": 2.0}})],
    ),
    "pissa": (
        {"target_modules": ["fc"], "init_lora_weights": "pissa"},
        [("fc.weight", {"lora": {**LORA, "init_lora_weights": "pissa"}})],
    ),
    "random start": (
        {"target_modules": ["fc"], "init_lora_weights": False},
        [("fc.weight", {"lora": {**LORA, "init_lora_weights": "gaussian"}})],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_outputs_are_pefts(case: str, capture: str, tmp_path: Path) -> None:
    config, chains = CASES[case]
    theirs = saved(tmp_path, new_net(), **{**LORA, **config})
    new = load_model(tmp_path, model=lambda: rewrite(new_net(), rules(*chains), capture=capture)).eval()
    torch.testing.assert_close(new(X), theirs(X), rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(dict(bake(new).state_dict()), dict(merged.state_dict()), rtol=1e-5, atol=1e-5)


def test_a_gpt2_with_two_targets_gives_pefts_logits(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
    torch.manual_seed(1)
    base = transformers.GPT2LMHeadModel(config)
    targets = {"target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    theirs = saved(tmp_path, base, **LORA, **targets)
    spec = rules(("transformer.h.*.{attn.c_attn,mlp.c_fc}.weight", {"lora": LORA}))
    new = rewrite(base, spec).eval()
    assert str(new.load_state_dict(read_adapter(tmp_path))) == "<All keys matched successfully>"
    torch.testing.assert_close(new(X).logits, theirs(X).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_converts_to_plain_weights(tmp_path: Path) -> None:
    theirs = saved(tmp_path, new_net(), **LORA, target_modules=["fc"])
    new = rewrite(new_net(), rules(("fc.weight", {"lora": LORA})))
    before = copy.deepcopy(new.state_dict())
    plain = convert_state_dict(read_adapter(tmp_path), new, to="plain")
    torch.testing.assert_close(plain["fc.weight"], theirs.merge_and_unload().fc.weight.detach())
    torch.testing.assert_close(new.state_dict(), before, rtol=0, atol=0)


def test_an_old_file_of_weights_loads(tmp_path: Path) -> None:
    theirs = saved(tmp_path, new_net(), **LORA, target_modules=["fc"])
    torch.save(dict(read_adapter(tmp_path)), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    new = rewrite(new_net(), rules(("fc.weight", {"lora": LORA})))
    new.load_state_dict(read_adapter(tmp_path))
    torch.testing.assert_close(new(X), theirs(X))


def test_a_half_precision_base_keeps_the_adapters_precision(tmp_path: Path) -> None:
    theirs = saved(tmp_path, new_net(), **LORA, target_modules=["fc"])
    new = rewrite(new_net().bfloat16(), rules(("fc.weight", {"lora": LORA})))
    new.load_state_dict(read_adapter(tmp_path))
    found = new.get_submodule("fc.parametrizations.weight.0")
    torch.testing.assert_close(found.lora_B, theirs.base_model.model.fc.lora_B["default"].weight, rtol=0, atol=0)


WRONG: dict[str, tuple[dict[str, Any], list[tuple[str, dict[str, Any]]], str]] = {
    "rank": ({}, [("fc.weight", {"lora": {"r": 3, "lora_alpha": 9}})], r"fc\.weight.*rank 2.*rank 3.*lora: {r: 2"),
    "alpha": ({}, [("fc.weight", {"lora": {"r": 2, "lora_alpha": 8}})], r"scale 3, .*scale 4: let the chain be lora"),
    "rslora": ({"use_rslora": True}, [("fc.weight", {"lora": LORA})], r"scale 4\.24264.*use_rslora: true"),
    "dora": ({"use_dora": True}, [("fc.weight", {"lora": LORA})], r"computes dora: {r: 2, lora_alpha: 6}"),
    "no dora": ({}, [("fc.weight", {"dora": LORA})], r"let the chain be lora: {r: 2, lora_alpha: 6}"),
    "a target without a site": (
        {"target_modules": ["fc", "conv"]},
        [("fc.weight", {"lora": LORA})],
        r"conv\.weight: the adapter changes it, and no chain",
    ),
    "a site without a target": (
        {},
        [("{fc,conv}.weight", {"lora": LORA})],
        r"conv\.weight: the adapter does not change it: leave it out",
    ),
    "the start": (
        {"init_lora_weights": "pissa"},
        [("fc.weight", {"lora": LORA})],
        r"adapter's starts from 'pissa': write init_lora_weights: pissa",
    ),
    "our start": (
        {},
        [("fc.weight", {"lora": {**LORA, "init_lora_weights": False}})],
        r"less the start False.*write init_lora_weights: true",
    ),
    "dora of an embedding": (
        {"target_modules": ["embed"], "use_dora": True},
        [("embed.weight", {"dora": LORA})],
        r"one length for each column of the weight.*merge_and_unload",
    ),
    "another step": ({}, [("fc.weight", "weight_norm")], r"computes lora: .*and the model weight_norm"),
    "chunks": ({}, [("fc.weight", {"lora": LORA})], r"let the chain be lora"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_name(case: str, strict: bool, tmp_path: Path) -> None:
    config, chains, message = WRONG[case]
    saved(tmp_path, new_net(), **{**LORA, "target_modules": ["fc"], **config})
    spec = rules(*chains)
    if case == "chunks":
        spec["rules"][0]["per"] = {"dim": 0, "chunks": 2}
    new = rewrite(new_net(), spec)
    before = copy.deepcopy(dict(new.state_dict()))
    with pytest.raises(RuntimeError, match=message):
        new.load_state_dict(read_adapter(tmp_path), strict=strict)
    torch.testing.assert_close(dict(new.state_dict()), before, rtol=0, atol=0)


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    saved(tmp_path, new_net(), **LORA, target_modules=["fc", "head"])
    with pytest.raises(ModelFileError) as raised:
        load_model(tmp_path, model=lambda: rewrite(new_net(), rules(("{fc,conv}.weight", {"lora": {"r": 3}}))))
    assert all(re.search(name, str(raised.value)) for name in (r"fc\.weight: .*rank", r"conv\.weight", r"head\.weight"))


def test_a_tied_weight_is_refused(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].weight = base[0].weight
    saved(tmp_path, base, **LORA, target_modules=["0"])
    with pytest.raises(RuntimeError, match=r"0\.weight, 1\.weight are tied.*untie"):
        rewrite(base, rules(("0.weight", {"lora": LORA}))).load_state_dict(read_adapter(tmp_path))


def test_a_state_of_a_peft_model_without_its_settings_is_refused(tmp_path: Path) -> None:
    theirs = saved(tmp_path, new_net(), **LORA, target_modules=["fc"])
    new = rewrite(new_net(), rules(("fc.weight", {"lora": LORA})))
    for state in (theirs.state_dict(), peft.get_peft_model_state_dict(theirs)):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=r"save_pretrained\(folder\).*read_adapter\(folder\)"):
                new.load_state_dict(state, strict=strict)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, r"peft_type is 'LOHA'; reparam loads 'LORA'.*merge_and_unload"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_qalora": True}, "use_qalora=True changes what the layers compute.*merge_and_unload"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"target_parameters": ["fc.weight"]}, "target_parameters="),
        ({"from_the_future": 3}, "from_the_future=3"),
        ({"lora_alpha": "6"}, "damaged: r, lora_alpha"),
        ({"alpha_pattern": {"(a*)*b": 3}}, "regular expression"),
    ],
    ids=str,
)
def test_other_adapters_are_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, new_net(), **LORA, target_modules=["fc"])
    changed(tmp_path, **settings)
    with pytest.raises(ModelFileError, match=message):
        read_adapter(tmp_path)


def damage(folder: Path, what: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    actions: dict[str, Callable[[], Any]] = {
        "no config": config.unlink,
        "no weights": weights.unlink,
        "no JSON": lambda: config.write_text("{"),
        "a list": lambda: config.write_text("[1]"),
        "bad weights": lambda: weights.write_bytes(b"nonsense"),
    }
    actions[what]()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", r"no folder that PEFT's save_pretrained wrote"),
        ("no weights", r"has no adapter_model\.safetensors"),
        ("no JSON", r"cannot be read as JSON"),
        ("a list", r"holds no settings of an adapter"),
        ("bad weights", r"adapter_model\.safetensors"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(what: str, message: str, tmp_path: Path) -> None:
    saved(tmp_path, new_net(), **LORA, target_modules=["fc"])
    damage(tmp_path, what)
    with pytest.raises(ModelFileError, match=message):
        read_adapter(tmp_path)


def test_a_model_that_was_not_rewritten_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, new_net(), **LORA, target_modules=["fc"])
    with pytest.raises(ModelFileError, match=r"no tensor of the Net is computed by lora or dora"):
        load_model(tmp_path, model=new_net)
    with pytest.raises(ModelFileError, match=r"--model package\.module:factory"):
        load_model(tmp_path)


def test_the_command_bakes_an_adapter_into_plain_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter.cli import main

    folder = tmp_path / "adapter"
    theirs = saved(folder, new_net(), **LORA, target_modules=["fc"])
    monkeypatch.chdir(tmp_path)
    factory = f"{__name__}:_lora_net"
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["bake", str(folder), "--model", factory, "-o", "plain.safetensors"])
    plain = load_model(tmp_path / "plain.safetensors", model=new_net)
    torch.testing.assert_close(plain(X), theirs(X))


def _lora_net() -> nn.Module:
    return rewrite(new_net(), rules(("fc.weight", {"lora": LORA})))
