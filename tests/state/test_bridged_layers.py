"""Checkpoints of layers of every kind, in the forms that torch has for a computed tensor, into other chains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from rewriter import RewriterError, bake, rewrite
from rewriter.state import convert_state_dict

X = torch.linspace(-1, 1, 72, dtype=torch.float64).reshape(4, 3, 6)
TENSORS = {"fc": "weight", "conv": "weight", "up": "weight", "rnn": "weight_hh_l0", "table": "weight"}


class Net(nn.Module):
    """A layer of each kind whose tensors differ in what their dimensions mean."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(6, 6), nn.Embedding(6, 6)
        self.conv, self.up = nn.Conv1d(3, 5, 2), nn.ConvTranspose1d(5, 3, 2)
        self.norm, self.rnn = nn.BatchNorm1d(3), nn.LSTM(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(self.norm(self.up(self.conv(self.fc(x)))))[0]
        return y @ self.table(torch.arange(6))


FORMS: dict[str, tuple[Callable[..., Any], Any]] = {
    "plain": (lambda layer, name: None, "lora"),
    "old weight norm": (nn.utils.weight_norm, "weight_norm"),
    "old spectral norm": (nn.utils.spectral_norm, "spectral_norm"),
    "pruned": (lambda layer, name: prune.l1_unstructured(layer, name, 4), {"l1_unstructured": {"amount": 4}}),
    "weight norm": (parametrizations.weight_norm, "weight_norm"),
    "spectral norm": (parametrizations.spectral_norm, "spectral_norm"),
}


def source(form: str) -> nn.Module:
    model = Net().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path, name in TENSORS.items():
            FORMS[form][0](model.get_submodule(path), name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    for _ in range(2):
        model(X)
    return model.eval()


def rewritten(*chain: Any) -> nn.Module:
    select = [f"{path}.{name}" for path, name in TENSORS.items()]
    rule = {"name": "r", "select": select, "chain": list(chain)}
    return rewrite(Net().double(), {"reparam": 1, "rules": [rule]}).eval()


@pytest.mark.parametrize("form", FORMS)
def test_a_form_fills_its_own_chain_and_gives_plain_weights(form: str) -> None:
    model, new = source(form), rewritten(FORMS[form][1])
    new.load_state_dict(model.state_dict())
    expected = model(X)
    torch.testing.assert_close(new(X), expected)
    torch.testing.assert_close(bake(new)(X), expected)
    plain = Net().double().eval()
    plain.load_state_dict(convert_state_dict(model.state_dict(), new, to="plain"))
    torch.testing.assert_close(plain(X), expected)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("weight norm", "spectral norm")])
@pytest.mark.parametrize("chain", [["lora"], [{"scale": {"factor": 2.0}}, "weight_norm"]], ids=["lora", "two steps"])
def test_a_form_fills_another_chain(form: str, chain: list[Any]) -> None:
    model, new = source(form), rewritten(*chain)
    new.load_state_dict(model.state_dict())
    torch.testing.assert_close(new(X), model(X))


@pytest.mark.parametrize("form", FORMS)
def test_a_form_off_the_space_is_refused(form: str) -> None:
    new = rewritten("sphere")
    with pytest.raises(RewriterError, match=r"fc\.weight"):
        new.load_state_dict(source(form).state_dict())
