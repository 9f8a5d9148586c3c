"""Models that torch's own tools changed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune


class Symmetric(nn.Module):
    def forward(self, X):
        return X.triu() + X.triu(1).mT

    def right_inverse(self, value):
        return value.triu()


class Halved(nn.Module):
    def forward(self, X):
        return X[: X.shape[0] // 2]

    def right_inverse(self, value):
        return torch.cat([value, torch.zeros_like(value)])


class Reader(nn.Module):
    """Reads its weight by name, as a user's module does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) @ self.fc.weight


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > -1e9 else x


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x[None])[0]


def _two():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def _orthogonal():
    model = _two()
    parametrizations.orthogonal(model[0])
    return model


def _chain():
    model = _two()
    parametrizations.spectral_norm(model[0])
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    parametrize.register_parametrization(model[2], "bias", nn.Softplus(), unsafe=True)
    return model


def _unsafe():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    parametrize.register_parametrization(model[0], "weight", Halved(), unsafe=True)
    return model


def _several():
    model = _two()
    parametrizations.weight_norm(model[0])
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    return model


def _buffer():
    model = nn.Sequential(nn.BatchNorm1d(4))
    parametrize.register_parametrization(model[0], "running_var", nn.Softplus())
    return model.eval()


def _read_twice():
    model = Reader()
    parametrizations.weight_norm(model.fc)
    return model


def _untraceable():
    model = Untraceable()
    parametrizations.spectral_norm(model.fc)
    return model


def _recurrent():
    model = Recurrent()
    parametrizations.orthogonal(model.rnn, "weight_hh_l0")
    return model


def _recurrent_twice():
    model = Recurrent()
    parametrizations.orthogonal(model.rnn, "weight_hh_l0")
    parametrizations.weight_norm(model.rnn, "weight_ih_l0")
    return model


def _old_weight_norm():
    model = _two()
    utils.weight_norm(model[0])
    utils.weight_norm(model[2], dim=None)
    return model


def _old_spectral_norm():
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Flatten(), nn.Linear(75, 3))
    utils.spectral_norm(model[0], n_power_iterations=2)
    utils.spectral_norm(model[2])
    return nn.Sequential(nn.Linear(4, 32), nn.Unflatten(1, (2, 4, 4)), model)


def _old_recurrent():
    model = Recurrent()
    utils.weight_norm(model.rnn, "weight_hh_l0")
    return model


def _pruned():
    model = _two()
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model


def _pruned_often():
    model = _pruned()
    prune.random_unstructured(model[0], "weight", 0.2)
    prune.random_unstructured(model[0], "bias", 1)
    prune.ln_structured(model[2], "weight", 1, n=2, dim=0)
    return model


def _pruned_globally():
    model = _two()
    prune.global_unstructured([(model[0], "weight"), (model[2], "weight")], prune.L1Unstructured, amount=0.5)
    return model


def _pruned_under_weight_norm():
    model = _two()
    utils.weight_norm(model[0])
    prune.l1_unstructured(model[0], "weight_v", 0.3)
    return model


def _pruned_under_a_parametrization():
    model = _two()
    parametrizations.weight_norm(model[0])
    prune.l1_unstructured(model[0].parametrizations.weight, "original1", 0.3)
    return model


KINDS = {
    "torch.parametrize": [
        _orthogonal, _chain, _unsafe, _several, _buffer, _read_twice, _untraceable, _recurrent, _recurrent_twice,
    ],
    "torch.weight_norm": [_old_weight_norm, _old_recurrent],
    "torch.spectral_norm": [_old_spectral_norm],
    "torch.prune": [_pruned, _pruned_often, _pruned_globally],
    "torch.prune+torch.weight_norm": [_pruned_under_weight_norm],
    "torch.prune+torch.parametrize": [_pruned_under_a_parametrization],
}  # fmt: skip
