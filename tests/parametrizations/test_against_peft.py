"""Adapters against PEFT itself, where it is installed: the same parameters give the merged weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.parametrizations._registry import construct, find

peft = pytest.importorskip("peft")

LAYERS = {
    "linear": lambda: nn.Linear(8, 6),
    "kernel": lambda: nn.Conv2d(4, 6, 3),
    "kernel 1d": lambda: nn.Conv1d(4, 6, 3),
    "embedding": lambda: nn.Embedding(6, 8),
}
CASES: list[tuple[str, str, dict[str, Any], str, dict[str, Any]]] = [
    ("lora", "LoraConfig", {}, "linear", {"r": 2, "lora_alpha": 3}),
    ("lora", "LoraConfig", {}, "kernel", {"r": 2, "lora_alpha": 3, "use_rslora": True}),
    ("dora", "LoraConfig", {"use_dora": True}, "linear", {"r": 2, "lora_alpha": 3}),
    ("dora", "LoraConfig", {"use_dora": True}, "kernel", {"r": 2, "lora_alpha": 3}),
    ("adalora", "AdaLoraConfig", {"init_r": 2, "target_r": 2, "total_step": 9}, "linear", {"r": 2, "lora_alpha": 3}),
    ("loha", "LoHaConfig", {}, "linear", {"r": 2, "alpha": 3}),
    ("loha", "LoHaConfig", {}, "kernel", {"r": 2, "alpha": 3}),
    ("lokr", "LoKrConfig", {}, "linear", {"r": 1, "alpha": 3}),
    ("lokr", "LoKrConfig", {}, "linear", {"r": 1, "decompose_both": True, "decompose_factor": 4}),
    ("lokr", "LoKrConfig", {}, "kernel", {"r": 1, "alpha": 3}),
    ("lokr", "LoKrConfig", {}, "kernel", {"r": 8, "alpha": 3}),
    ("lokr", "LoKrConfig", {}, "kernel 1d", {"r": 1, "alpha": 3}),
    ("lokr", "LoKrConfig", {}, "kernel 1d", {"r": 8, "alpha": 3}),
    ("lokr", "LoKrConfig", {}, "kernel 1d", {"r": 1, "decompose_both": True}),
    ("loha", "LoHaConfig", {}, "kernel 1d", {"r": 2, "alpha": 3}),
    ("lora", "LoraConfig", {}, "kernel 1d", {"r": 2, "lora_alpha": 3}),
    ("vera", "VeraConfig", {}, "linear", {"r": 3}),
    ("ia3", "IA3Config", {"feedforward_modules": []}, "linear", {}),
    ("ia3", "IA3Config", {"feedforward_modules": ["0"]}, "linear", {"feedforward": True}),
    ("oft", "OFTConfig", {"r": 0, "use_cayley_neumann": False}, "linear", {"oft_block_size": 4}),
    ("hra", "HRAConfig", {}, "linear", {"r": 2}),
    ("hra", "HRAConfig", {}, "kernel", {"r": 3, "apply_GS": True, "init_weights": False}),
    ("road", "RoadConfig", {}, "linear", {"variant": "road_1", "group_size": 2}),
    ("road", "RoadConfig", {}, "linear", {"variant": "road_2", "group_size": 6}),
    ("road", "RoadConfig", {}, "linear", {"variant": "road_4", "group_size": 2}),
    ("fourierft", "FourierFTConfig", {}, "linear", {"n_frequency": 5, "scaling": 2.0}),
    ("c3a", "C3AConfig", {}, "linear", {"block_size": 2}),
    ("shira", "ShiraConfig", {}, "linear", {"r": 1}),
    ("miss", "MissConfig", {}, "linear", {"r": 3}),
    ("hira", "HiraConfig", {}, "linear", {"r": 2}),
    ("delora", "DeloraConfig", {}, "linear", {"r": 2, "delora_lambda": 3}),
    ("gralora", "GraloraConfig", {}, "linear", {"r": 4, "alpha": 3, "gralora_k": 2}),
    ("trainable_tokens", "TrainableTokensConfig", {}, "embedding", {"token_indices": [1, 3]}),
]
THEIR_NAMES = {"magnitude": "lora_magnitude_vector"}
OUR_OWN = {"r": ("adalora",), "feedforward": ("ia3",)}
"""Arguments that PEFT calls otherwise, given in the third column."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "config", "theirs", "layer", "ours"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_the_merged_weight_is_pefts(
    name: str, config: str, theirs: dict[str, Any], layer: str, ours: dict[str, Any]
) -> None:
    if not hasattr(peft, config):
        pytest.skip(f"this version of PEFT has no {config}")
    plain = nn.Sequential(LAYERS[layer]())
    weight = plain[0].weight.detach().clone()
    shared = {key: value for key, value in ours.items() if name not in OUR_OWN.get(key, ())}
    model = peft.get_peft_model(plain, getattr(peft, config)(target_modules=["0"], **theirs, **shared))
    adapter = construct(find(name), weight, ours)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for key, tensor in adapter.state_dict().items():
            tensor.copy_(_found(model, THEIR_NAMES.get(key, key), tensor))
    torch.testing.assert_close(adapter.eval()(weight), model.merge_and_unload()[0].weight, rtol=1e-4, atol=1e-5)


def _found(model: Any, key: str, ours: Tensor) -> Tensor:
    """PEFT's tensor of this name; what is fixed and not stored under a name of its own stays ours."""
    if key in ("vera_A", "vera_B"):
        return getattr(model.base_model, key)["default"]
    if key == "shira_indices":
        rows, columns = model.base_model.model[0].shira_indices["default"].long()
        return rows * 8 + columns
    found = [p for name, p in model.named_parameters() if p.requires_grad and f".{key}." in f"{name}."]
    return found[0].reshape(ours.shape) if found else ours


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_start_is_pefts(start: str) -> None:
    plain = nn.Sequential(nn.Linear(8, 6))
    weight = plain[0].weight.detach().clone()
    config = peft.LoraConfig(target_modules=["0"], r=2, lora_alpha=3, init_lora_weights=start)
    theirs = peft.get_peft_model(plain, config).base_model.model[0]
    ours: Any = construct(find("lora"), weight, {"r": 2, "lora_alpha": 3, "init_lora_weights": start})
    torch.testing.assert_close(ours.lora_A, theirs.lora_A["default"].weight)
    torch.testing.assert_close(ours.lora_B, theirs.lora_B["default"].weight)
    torch.testing.assert_close(ours.right_inverse(weight), theirs.base_layer.weight.detach())
