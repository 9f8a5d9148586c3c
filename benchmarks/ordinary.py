"""Ordinary networks, in which each computed weight is used once per forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import rewriter
from benchmarks import _networks as networks
from benchmarks._measure import interleaved
from benchmarks._models import ORTHOGONAL, by_torch, spec_of, training_step, under_cached
from benchmarks._report import Group
from benchmarks._settings import Settings

AGAINST_TORCH = 1 / 1.02
BY_HAND = 1.05
VERSION = 1.05
OWN = {"standardise": networks.Standardise, "lora": networks.LowRank}
"""The parametrizations that torch does not have."""
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)


@dataclass(frozen=True)
class Work:
    """One network with one parametrization of its weights.

    Arguments:
        name: of the network.
        build: the network of a width.
        width: see `build`.
        batch: shape of the input.
        by: name of the parametrization.
        plain: the most that a training step takes, as a ratio to that of the same network with plain weights.
        torch: how many times faster than torch's parametrization a step is, at least.
        inference: whether a forward with ``cache: version`` is timed as well.
        small: belongs to a quick run.
    """

    name: str
    build: Callable[[int], nn.Module]
    width: int
    batch: tuple[int, ...]
    by: str
    plain: float | None = None
    torch: float = AGAINST_TORCH
    inference: bool = False
    small: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {self.by}"


def _mlps(width: int, bounds: dict[str, tuple[float | None, float]], small: bool) -> list[Work]:
    return [
        Work(f"MLP d={width}", networks.mlp, width, (32, width), by, plain, torch_, small=small)
        for by, (plain, torch_) in bounds.items()
    ]


_MLP_64 = {
    "spectral_norm": (2.0, AGAINST_TORCH),
    "weight_norm": (1.25, AGAINST_TORCH),
    "cayley": (None, AGAINST_TORCH),
    "householder": (None, AGAINST_TORCH),
}
_MLP_256 = {
    "spectral_norm": (1.35, AGAINST_TORCH),
    "weight_norm": (1.2, AGAINST_TORCH),
    "cayley": (6.0, 10.0),
    "householder": (6.0, 60.0),
}
WORKS = [
    *_mlps(64, _MLP_64, small=True),
    *_mlps(256, _MLP_256, small=False),
    Work("critic b=16", networks.critic, 32, (16, 3, 32, 32), "spectral_norm", 1.1, inference=True, small=True),
    Work("critic b=64", networks.critic, 32, (64, 3, 32, 32), "spectral_norm", 1.05, inference=True),
    Work("vocoder c=64", networks.vocoder, 64, (4, 20, 16), "weight_norm", 1.05, inference=True, small=True),
    Work("vocoder c=128", networks.vocoder, 128, (4, 20, 32), "weight_norm", 1.05, inference=True),
    Work("TCN c=32", networks.tcn, 32, (8, 32, 256), "weight_norm", 1.05, inference=True, small=True),
    Work("TCN c=64", networks.tcn, 64, (16, 64, 256), "weight_norm", 1.05, inference=True),
    Work("transformer d=64", networks.transformer, 64, (8, 32, 64), "spectral_norm", small=True),
    Work("transformer d=256", networks.transformer, 256, (8, 64, 256), "spectral_norm"),
    Work("transformer d=64", networks.transformer, 64, (8, 32, 64), "lora", small=True),
    Work("transformer d=256", networks.transformer, 256, (8, 64, 256), "lora"),
    Work("ResNet c=16", networks.resnet, 16, (8, 16, 32, 32), "standardise", small=True),
    Work("ResNet c=32", networks.resnet, 32, (16, 32, 32, 32), "standardise"),
]


def measure(settings: Settings) -> Group:
    """Time the training step of each network, and the forward of some."""
    group = Group(
        "Ordinary networks, one training step",
        "Every linear and convolutional weight is parametrized (the first and last of the vocoder and the last of the "
        "critic are not). *plain* is the same network with the values of the weights as parameters. *by hand* "
        "evaluates each chain once ahead of the forward, with torch's functions, and sets the weights. *version* is a "
        "forward without gradients with `cache: version`. With *lora* only the adapters are trained; *plain* trains "
        "all weights. A quick run has the smaller networks and seven rounds.\n\n"
        "Scales are not moved from weights to outputs. By hand, spectral norm's scale on the input or the output of "
        "each layer took 0.96 to 1.05 of the time at these sizes, within the noise, and 0.92 at width 1024 with batch "
        "8. With weight norm, for which torch has one kernel, it took 1.1 to 1.7 times the time.",
    )
    for work in WORKS:
        if work.small or not settings.quick:
            _measure(settings, group, work)
    return group


def _measure(settings: Settings, group: Group, work: Work) -> None:
    torch.manual_seed(0)
    model = work.build(work.width).to(settings.device)
    x, tensors = torch.randn(work.batch, device=settings.device), _tensors(model)
    new = rewriter.rewrite(model, _spec(work.by, tensors))
    torchs = _by_torch(model, work.by, tensors)
    contenders = {
        "plain": training_step(rewriter.bake(new), x),
        "by hand": training_step(ByHand(model, new, work.by, tensors), x),
        "ours": training_step(new, x),
        "torch uncached": training_step(torchs, x),
        "torch cached": under_cached(training_step(copy.deepcopy(torchs), x)),
    }
    rounds = 7 if settings.quick else 30
    timings = interleaved(contenders, rounds, device=settings.device)
    group.add_times(str(work), timings)
    plain = None if work.plain is None else settings.asked(work.plain)
    group.costs(str(work), timings, "ours", "plain", plain)
    group.costs(str(work), timings, "by hand", "plain", None)
    group.costs(str(work), timings, "ours", "by hand", settings.asked(BY_HAND))
    for who in ("torch uncached", "torch cached"):
        group.faster(str(work), timings, "ours", who, settings.asked(work.torch))
    if work.inference:
        cached = rewriter.rewrite(model, _spec(work.by, tensors, cache="version"))
        forwards = {
            "plain": _forward(rewriter.bake(cached), x),
            "version": _forward(cached, x),
            "torch uncached": _forward(torchs, x),
        }
        timings = interleaved(forwards, rounds, device=settings.device)
        group.add_times(f"{work}, inference", timings)
        group.costs(f"{work}, inference", timings, "version", "plain", settings.asked(VERSION))
        group.faster(f"{work}, inference", timings, "version", "torch uncached", settings.asked(AGAINST_TORCH))


def _tensors(model: nn.Module) -> list[str]:
    """Return the weights to parametrize: not those with one channel in or out, nor the first of a vocoder."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    return [f"{name}.weight" for name, layer in layers if layer.weight.size(0) > 1 and layer.weight.size(1) != 20]


def _spec(by: str, tensors: list[str], **options: str) -> rewriter.Spec:
    if by == "lora":
        step = {"lora": {"r": networks.RANK, "lora_alpha": networks.RANK}}
        rule = {"name": "adapters", "select": tensors, "chain": [step], **options}
        return rewriter.load_spec({"reparam": 1, "trainable": "rewritten", "rules": [rule]})
    if by != "standardise":
        return spec_of(by, tensors, **options)
    rule = {"name": "weights", "select": tensors, "chain": [networks.Standardise()], "init": "raw", **options}
    return rewriter.load_spec({"reparam": 1, "rules": [rule]})


def _by_torch(model: nn.Module, by: str, tensors: list[str]) -> nn.Module:
    if by not in OWN:
        return by_torch(model, by, tensors)
    model = copy.deepcopy(model).requires_grad_(by != "lora")
    for name in tensors:
        owner, _, tensor = name.rpartition(".")
        module = model.get_submodule(owner)
        parametrize.register_parametrization(module, tensor, OWN[by](getattr(module, tensor)))
    return model


class ByHand(nn.Module):
    """A network whose weights are computed ahead of its forward and set on its layers, as old hooks of torch did.

    Arguments:
        model: the network.
        new: the same network, rewritten; its originals are copied, and its chains where torch has no function.
        by: name of the parametrization.
        tensors: names of the weights.
    """

    def __init__(self, model: nn.Module, new: nn.Module, by: str, tensors: Sequence[str]) -> None:
        super().__init__()
        self.model, self.chains, self.originals = copy.deepcopy(model), nn.ModuleList(), nn.ModuleList()
        self.model.requires_grad_(by != "lora")
        self.layers: list[nn.Module] = []
        for name in tensors:
            owner = name.rpartition(".")[0]
            site = new.get_submodule(f"{owner}.parametrizations.weight")
            originals = [tensor.detach().clone() for tensor in site.parameters(recurse=False)]
            self.originals.append(nn.ParameterList(originals).requires_grad_(by != "lora"))
            self.chains.append(_chain(by, site.get_submodule("0"), originals).to(originals[0].device))
            layer = self.model.get_submodule(owner)
            del layer.weight
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output."""
        for layer, chain, originals in zip(self.layers, self.chains, self.originals, strict=True):
            layer.__dict__["weight"] = chain(*originals)  # type: ignore[misc]
        output: Tensor = self.model(x)
        return output


def _chain(by: str, chain: nn.Module, originals: Sequence[Tensor]) -> nn.Module:
    if by == "weight_norm":
        return _WeightNorm()
    if by == "spectral_norm":
        return _SpectralNorm(originals[0])
    return copy.deepcopy(chain) if by in ORTHOGONAL else OWN[by](originals[0])


class _WeightNorm(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        size, direction = (first, second) if first.numel() < second.numel() else (second, first)
        return torch._weight_norm(direction, size, 0)


class _SpectralNorm(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        u, _, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        self.register_buffer("u", u[:, 0].clone())
        self.register_buffer("v", vh[0].clone())

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        with torch.no_grad():
            u = torch.mv(matrix, self.v)
            self.u = u / u.norm()
            v = torch.mv(matrix.T, self.u)
            self.v = v / v.norm()
        return weight / torch.dot(self.u, torch.mv(matrix, self.v))


def _forward(model: nn.Module, x: Tensor) -> Callable[[], None]:
    model.eval()

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run
