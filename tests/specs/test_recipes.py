"""Each recipe on a small model: it trains, meets its guarantee, and bakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import bake, load_spec, plan, rewrite

SPECS = Path(__file__).parents[2] / "specs"


class Rnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Discriminator(nn.Module):
    """A conditional discriminator with a projection of the class embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(4, 8, 4, 2, 1), nn.LeakyReLU(0.1), nn.Flatten()
        )
        self.embed = nn.Embedding(3, 128)
        self.out = nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.out(h) + (self.embed(torch.tensor([0, 1, 2, 1])) * h).sum(1, keepdim=True)


class Tcn(nn.Module):
    """Two causal, dilated convolutions with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, dilation=2**level) for level in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for level, conv in enumerate(self.convs):
            x = x + torch.relu(conv(F.pad(x, (2 * 2**level, 0))))
        return x.mean(-1)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x).mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            self.add_module(f"{name}_proj", nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return x + self.o_proj(F.scaled_dot_product_attention(q, k, v))


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Attention(), Attention())
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(x).mean(1))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 6, num_layers=2, batch_first=True)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Gaussian(nn.Module):
    """The negative log-likelihood of residuals under a learned covariance."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(5, 3)
        self.covariance = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.mean(x)
        half = torch.linalg.cholesky(self.covariance)
        z = torch.linalg.solve_triangular(half, residual.mT, upper=False)
        return 0.5 * z.square().sum(0) + half.diagonal().log().sum()


class LanguageModel(nn.Module):
    """A decoder with a transposed matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.decode = nn.Parameter(torch.randn(6, 11))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embed(x))) @ self.decode


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.inner = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(torch.relu(self.first(x))))
        return self.head(self.norm(x).mean((2, 3)))


def orthogonal(model: Any) -> None:
    Q = model.rnn.weight_hh_l0
    torch.testing.assert_close(Q @ Q.T, torch.eye(8))


def of_norm_one(model: Any) -> None:
    model.train()
    for _ in range(200):
        model(torch.randn(4, 1, 16, 16))
    model.eval()
    for weight in (model.get_submodule("body.0").weight, model.embed.weight, model.out.weight):
        norm = float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2))
        assert math.isclose(norm, 1.0, rel_tol=1e-2)


def normalised(model: Any) -> None:
    for level in range(2):
        conv = model.get_submodule(f"convs.{level}")
        length, direction = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
        assert length.shape == (4, 1, 1)
        torch.testing.assert_close(conv.weight.flatten(1).norm(dim=1), length.flatten().abs())
        assert direction.grad is not None and length.grad is not None


def two_of_four(model: Any) -> None:
    layer = model.get_submodule("encoder.layers.1")
    for weight in (
        layer.self_attn.in_proj_weight,
        layer.self_attn.out_proj.weight,
        layer.linear1.weight,
        layer.linear2.weight,
    ):
        assert int((weight.unflatten(-1, (-1, 4)) != 0).sum(-1).max()) == 2
    assert bool((model.out.weight != 0).all())


def adapted(model: Any) -> None:
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 8 and all("_proj.parametrizations.weight.0.lora_" in name for name in trained)
    site = model.get_submodule("blocks.1.v_proj.parametrizations.weight")
    change = model.get_submodule("blocks.1.v_proj").weight - site.original
    assert 0 < int(torch.linalg.matrix_rank(change)) <= 4


def dropped_in_training(model: Any) -> None:
    stored = model.lstm.parametrizations.weight_hh_l1.original
    assert torch.equal(model.eval().lstm.weight_hh_l1, stored)
    x = torch.randn(4, 7, 3)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()


def positive_definite(model: Any) -> None:
    covariance = model.covariance.detach()
    torch.testing.assert_close(covariance, covariance.T)
    assert float(torch.linalg.eigvalsh(covariance).min()) > 0
    assert not torch.equal(covariance, torch.eye(3))


def tied(model: Any) -> None:
    assert torch.equal(model.decode, model.embed.weight.T)
    assert not [name for name in model.state_dict() if "decode" in name]


def on_the_grid(model: Any) -> None:
    for name, count in (("inner", 16), ("first", 256), ("head", 256)):
        for channel in model.get_submodule(name).weight.flatten(1):
            assert channel.unique().numel() <= min(count, channel.numel())
    steps = model.inner.parametrizations.weight.get_submodule("0").step_size
    codes = model.inner.weight / steps
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)


Recipe = tuple[type[nn.Module], Callable[[], Tensor], int, Callable[[Any], None]]
RECIPES: dict[str, Recipe] = {
    "orthogonal_rnn": (Rnn, lambda: torch.randn(4, 30, 3), 1, orthogonal),
    "spectral_gan": (Discriminator, lambda: torch.randn(4, 1, 16, 16), 4, of_norm_one),
    "weight_norm_tcn": (Tcn, lambda: torch.randn(4, 4, 20), 2, normalised),
    "sparse_transformer": (Transformer, lambda: torch.randn(4, 5, 8), 8, two_of_four),
    "lora_attention": (Attentive, lambda: torch.randn(4, 5, 8), 4, adapted),
    "weight_dropped_lstm": (Lstm, lambda: torch.randn(4, 7, 3), 2, dropped_in_training),
    "psd_covariance": (Gaussian, lambda: torch.randn(4, 5), 1, positive_definite),
    "tied_embedding": (LanguageModel, lambda: torch.randint(11, (4, 9)), 1, tied),
    "fake_quant_cnn": (Cnn, lambda: torch.randn(4, 1, 8, 8), 3, on_the_grid),
}


def test_every_spec_has_a_test_and_a_comment() -> None:
    written = {path.stem: path.read_text() for path in SPECS.glob("*.yaml")}
    assert written.keys() == RECIPES.keys()
    for text in written.values():
        comment = text.partition("reparam: 1")[0]
        assert comment.count("\n#") >= 4


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_meets_its_guarantee_and_bakes(name: str) -> None:
    kind, make_input, sites, guarantee = RECIPES[name]
    model, x = kind(), make_input()
    before = [tensor.detach().clone() for tensor in model.state_dict().values()]
    spec = load_spec(SPECS / f"{name}.yaml")
    assert len(plan(model, spec)) == sites
    new = rewrite(model, spec)
    assert all(map(torch.equal, before, model.state_dict().values()))

    optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (new(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] or name == "weight_dropped_lstm"

    guarantee(new)
    new.eval()
    plain = bake(new)
    assert type(plain) is kind
    assert list(plain.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(plain(x), new(x))
    torch.testing.assert_close(bake(new, keep="value")(x), plain(x))
