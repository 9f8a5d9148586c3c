"""With ``cache: version``: ways of changing a tensor that no attribute of the model shows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from rewriter import RewriterError, rewrite
from rewriter.parametrizations._registry import find
from tests.members import members


def _cached(recurrent: Any, **options: Any) -> Any:
    made = recurrent(cache="version", **options)
    with torch.no_grad():
        made.model(made.x)
        assert made.evaluations() == 0
    return made


def _expect_change(made: Any) -> None:
    """The next forward evaluates, gives what a model without any history gives, and the one after keeps."""
    with torch.no_grad():
        expected = made.fresh()
        assert made.evaluations() == 1
        torch.testing.assert_close(made.model(made.x), expected, rtol=0, atol=0)
        assert made.evaluations() == 0


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "rmsprop foreach": lambda p: torch.optim.RMSprop(p, lr=0.1, foreach=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_of_any_optimizer_is_a_change(recurrent: Any, kind: str) -> None:
    made = _cached(recurrent)
    optimizer = OPTIMIZERS[kind](made.model.parameters())

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = made.model(made.x).square().sum()
        value.backward()
        return value

    for _ in range(2):
        if kind == "lbfgs":
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
        _expect_change(made)


def _swap_tensors(made: Any) -> None:
    other = nn.Parameter(made.site.original.detach() + 1)
    torch.utils.swap_tensors(made.site.original, other)


def _swap_a_buffer_of_the_step(made: Any) -> None:
    step = getattr(made.site, "0")
    torch.utils.swap_tensors(step.shift, step.shift + 1)


def _replace_the_step(made: Any) -> None:
    other = copy.deepcopy(getattr(made.site, "0"))
    other.power = 5.0
    setattr(made.site, "0", other)


def _replace_the_site(made: Any) -> None:
    other = copy.deepcopy(made.model).cell.parametrizations.weight_hh
    other.contexts = made.site.contexts  # one of another model is evaluated whenever it is read
    with torch.no_grad():
        other.original.add_(1)
    made.model.cell.parametrizations.weight_hh = other
    made.site = other


def _replace_the_owner(made: Any) -> None:
    other = copy.deepcopy(made.model).cell
    with torch.no_grad():
        other.parametrizations.weight_hh.original.add_(1)
    made.model.cell = other
    made.site = other.parametrizations.weight_hh


@contextlib.contextmanager
def _swaps() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _convert_with_swaps(made: Any) -> None:
    with _swaps():
        made.model.float()
    made.x = made.x.float()


def _load_with_swaps(made: Any) -> None:
    with _swaps():
        made.model.load_state_dict({key: value + 1 for key, value in made.model.state_dict().items()})


def _through_a_view(made: Any) -> None:
    with torch.no_grad():
        made.site.original.view(-1)[3:5].zero_()


def _through_a_detached_alias(made: Any) -> None:
    made.site.original.detach()[0, 0] = 7.0


def _initialize(made: Any) -> None:
    nn.init.orthogonal_(made.site.original)


@pytest.mark.parametrize(
    "change",
    [
        _swap_tensors,
        _swap_a_buffer_of_the_step,
        _replace_the_step,
        _replace_the_site,
        _replace_the_owner,
        _convert_with_swaps,
        _load_with_swaps,
        _through_a_view,
        _through_a_detached_alias,
        _initialize,
    ],
    ids=lambda change: change.__name__.strip("_"),
)
def test_a_swap_or_a_write_from_elsewhere_is_a_change(recurrent: Any, change: Callable[[Any], None]) -> None:
    made = _cached(recurrent)
    change(made)
    _expect_change(made)


def _reading(capture: str, spec: Any) -> tuple[nn.Module, Tensor]:
    two = spec("1.weight", {"affine": {"inputs": ["0.weight"]}}, cache="version", init="raw")
    return rewrite(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), two, capture=capture), torch.randn(2, 4)


FURTHER: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda m: m[0].weight.detach().add_(1),
    "data": lambda m: setattr(m[0].weight, "data", m[0].weight.detach() + 1),
    "swapped": lambda m: torch.utils.swap_tensors(m[0].weight, nn.Parameter(m[0].weight.detach() + 1)),
    "another parameter": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach() + 1)),
    "loaded": lambda m: m.load_state_dict({key: value + 1 for key, value in m.state_dict().items()}),
    "half loaded": lambda m: m[0].load_state_dict({key: value + 1 for key, value in m[0].state_dict().items()}),
}


@pytest.mark.parametrize("change", FURTHER)
def test_what_a_chain_reads_from_elsewhere_may_change_in_any_way(capture: str, spec: Any, change: str) -> None:
    model, x = _reading(capture, spec)
    with torch.no_grad():
        before = model(x)
        FURTHER[change](_Indexed(model))
        expected = copy.deepcopy(model)(x)
        assert not torch.equal(expected, before)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


class _Indexed:
    """A model whose layers are found by number in both captures."""

    def __init__(self, model: nn.Module) -> None:
        object.__setattr__(self, "model", model)

    def __getitem__(self, index: int) -> Any:
        return self.model.get_submodule(str(index))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)


MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize("trained", [True, False])
def test_any_order_of_modes_gives_what_each_mode_gives(recurrent: Any, trained: bool) -> None:
    made = recurrent(cache="version")
    made.model.float().requires_grad_(trained)
    x = made.x.float()
    expected = {}
    for name, mode in MODES.items():
        with mode():
            expected[name] = copy.deepcopy(made.model)(x)
    generator = torch.Generator().manual_seed(0)
    names = list(MODES)
    for index in torch.randint(len(names), (60,), generator=generator).tolist():
        with MODES[names[index]]():
            out = made.model(x)
        wanted = expected[names[index]]
        assert out.dtype == wanted.dtype
        assert out.requires_grad == wanted.requires_grad
        assert out.is_inference() == wanted.is_inference()
        torch.testing.assert_close(out.detach().clone(), wanted.detach().clone(), rtol=0, atol=0)
        if out.requires_grad:
            out.float().sum().backward()


def test_another_device_is_another_value(recurrent: Any) -> None:
    made = _cached(recurrent)
    made.model.to("meta")
    with torch.no_grad():
        assert made.evaluations(lambda: made.model(made.x.to("meta"))) == 1
        assert made.model(made.x.to("meta")).is_meta
    made.model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.fill_(0.5)
        for buffer in made.model.buffers():
            buffer.fill_(0.5)
    _expect_change(made)


class _Settings(nn.Module):
    """Computes with what torch does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [1.0, [2.0]]
        self.named = {"factor": 3.0}
        self.nested = ([4.0], 5.0)

    def forward(self, X: Tensor) -> Tensor:
        return X * self.steps[0] * self.steps[1][0] * self.named["factor"] * self.nested[0][0]


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "list": lambda step: step.steps.__setitem__(0, 7.0),
    "list in a list": lambda step: step.steps[1].__setitem__(0, 7.0),
    "dict": lambda step: step.named.update(factor=7.0),
    "list in a tuple": lambda step: step.nested[0].__setitem__(0, 7.0),
    "another list": lambda step: setattr(step, "steps", [7.0, [2.0]]),
}


@pytest.mark.parametrize("change", SETTINGS)
def test_a_setting_that_is_changed_where_it_is_is_a_change(recurrent: Any, change: str) -> None:
    made = recurrent(_Settings(), cache="version")
    with torch.no_grad():
        before = made.model(made.x)
        assert made.site.policy.cached
        torch.testing.assert_close(made.model(made.x), before, rtol=0, atol=0)
        SETTINGS[change](getattr(made.site, "0"))
        expected = made.fresh()
        assert not torch.equal(expected, before)
        torch.testing.assert_close(made.model(made.x), expected, rtol=0, atol=0)


class _Opaque(nn.Module):
    """Computes with something that changes and does not show it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.held: Any = torch.Generator() if kind == "generator" else [torch.ones(5, dtype=torch.float64)]
        if kind == "array":
            self.held = numpy.ones(5)

    def forward(self, X: Tensor) -> Tensor:
        if isinstance(self.held, torch.Generator):
            return X + torch.rand(X.shape, generator=self.held, dtype=X.dtype)
        return X * (self.held[0] if isinstance(self.held, list) else torch.from_numpy(self.held))

    def __deepcopy__(self, memo: Any) -> _Opaque:
        clone = _Opaque("list")
        clone.held = self.held
        return clone


@pytest.mark.parametrize("kind", ["generator", "array", "list"])
def test_what_cannot_be_compared_is_not_cached(recurrent: Any, kind: str) -> None:
    made = recurrent(_Opaque(kind), cache="version")
    with torch.no_grad():
        before = made.model(made.x)
        held = getattr(made.site, "0").held
        if kind != "generator":
            held[0] *= 3
        assert not torch.equal(made.model(made.x), before)


def test_a_write_by_another_process_is_a_change(recurrent: Any) -> None:
    """Hogwild: the parameters lie in shared memory, and no counter of this process tells of a write."""
    made = _cached(recurrent)
    made.model.share_memory()
    other = made.site.original.detach()
    view = torch.from_numpy(other.numpy())  # the same memory, with a counter of its own, as in another process
    with torch.no_grad():
        for _ in range(2):
            before = made.model(made.x)
            view.add_(1)
            assert not torch.equal(made.model(made.x), before)
            torch.testing.assert_close(made.model(made.x), made.fresh(), rtol=0, atol=0)


def test_members_that_are_functions_are_cached_in_train_mode_too() -> None:
    for name in members():
        kind = find(name)
        if getattr(kind, "random", False) or getattr(kind, "stateful", False):
            continue
        torch.manual_seed(0)
        spec = {"reparam": 1, "rules": [{"name": "r", "select": "0.weight", "chain": [name], "cache": "version"}]}
        try:
            model = rewrite(nn.Sequential(nn.Linear(4, 4)), spec)
        except RewriterError:  # it needs arguments, or another tensor
            continue
        with torch.no_grad():
            model(torch.randn(2, 4))
        assert model.get_submodule("0").parametrizations.weight.policy.cached, name
