"""Late changes of modules whose forward is inlined in a graph: refused where they would have no effect."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake, rewrite
from rewriter.errors import RewriterError
from rewriter.state import get_value

SPEC = {"reparam": 1, "rules": [{"name": "w", "select": "**.{linear,conv}.weight", "chain": ["weight_norm"]}]}
REGISTERED = [
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
    "register_backward_hook",
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.conv(x)[:, 0]))


x = torch.randn(5, 2, 6)


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("register", REGISTERED)
@pytest.mark.parametrize("path", ["conv", "blocks", "blocks.0", "blocks.1.linear"])
def test_a_hook_that_would_never_run_warns(path: str, register: str) -> None:
    module = rewrite(Net(), SPEC, capture="graph").get_submodule(path)
    with pytest.warns(UserWarning, match=f"this hook of module {path} will not run.*capture='module'") as found:
        getattr(module, register)(lambda *_: None)
    assert found[0].filename == __file__


@pytest.mark.parametrize(
    ("capture", "path"),
    [
        *(("graph", path) for path in ("", "head", "blocks.0.norm")),
        *(("module", path) for path in ("conv", "blocks.0", "blocks.1.linear")),
    ],
)
def test_hooks_of_what_is_called_run(capture: str, path: str) -> None:
    model = rewrite(Net(), SPEC, capture=capture)
    seen: list[str] = []
    model.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    model(x)
    assert seen == [path]


def test_a_module_with_hooks_from_before_takes_more() -> None:
    plain = Net()
    seen: list[int] = []
    plain.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    model: Any = rewrite(plain, SPEC, capture="graph")
    for path in ("blocks.0", "blocks.0.linear"):
        model.get_submodule(path).register_forward_hook(lambda *_: seen.append(2))
    model(x)
    assert seen == [2, 1, 2]


@pytest.mark.parametrize(
    "carry",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deep", "shallow", "pickle"],
)
def test_copies_warn_as_well(carry: Any) -> None:
    model = carry(rewrite(Net(), SPEC, capture="graph"))
    with pytest.warns(UserWarning, match="this hook of module blocks.1 will not run"):
        model.blocks[1].register_forward_hook(lambda *_: None)


def test_a_baked_model_does_not_warn() -> None:
    model: Any = rewrite(Net(), SPEC, capture="graph")
    baked: Any = bake(model)
    kinds = [type(module) for module in baked.modules()]
    assert kinds == [type(module) for module in Net().modules()]
    baked.conv.register_forward_hook(lambda *_: None)


class Tempered(nn.Module):
    """Has a setting of every kind: an attribute, one of the class, one that only a helper reads."""

    rate = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4))
        self.tau = 1.0
        self.offsets = [1.0]
        self.steps_taken = 0

    def shifted(self, x: Tensor) -> Tensor:
        return x + self.offsets[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.shifted(self.body(x) / self.tau) * self.rate


TEMPERED = {"reparam": 1, "rules": [{"name": "w", "select": "body.0.weight", "chain": ["weight_norm"]}]}
LATE = {
    "attribute": lambda model: setattr(model, "tau", 0.1),
    "class attribute": lambda model: setattr(model, "rate", 2.0),
    "read by a method": lambda model: setattr(model, "offsets", [2.0]),
    "appended": lambda model: model.body.append(nn.Tanh()),
    "inserted": lambda model: model.body.insert(0, nn.Tanh()),
    "added": lambda model: model.body.add_module("tanh", nn.Tanh()),
    "removed": lambda model: model.body.__delitem__(0),
    "setting of a leaf": lambda model: setattr(model.body[0], "out_features", 3),
    "forward of a child": lambda model: setattr(model.body, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", LATE.values(), ids=LATE.keys())
@pytest.mark.parametrize("carry", [lambda model: model, copy.deepcopy], ids=["itself", "copy"])
def test_a_late_change_of_an_inlined_module_is_refused(change: Any, carry: Any) -> None:
    model: Any = carry(rewrite(Tempered(), TEMPERED, capture="graph"))
    x = torch.ones(1, 4)
    before = model(x)
    with pytest.raises(RewriterError, match=r"would have no effect.*bake\(\).*capture='module'"):
        change(model)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(bake(model)(x), before)
    change(bake(model))


@pytest.mark.parametrize("change", [LATE["attribute"], LATE["appended"]])
def test_module_capture_takes_late_changes(change: Any) -> None:
    model: Any = rewrite(Tempered(), TEMPERED, capture="module")
    x = torch.ones(1, 4)
    before = model(x)
    change(model)
    assert not torch.equal(model(x), before)
    torch.testing.assert_close(bake(model)(x), model(x))


def test_attributes_that_no_forward_reads_can_be_set() -> None:
    model: Any = rewrite(Tempered(), TEMPERED, capture="graph")
    model.tau = 1.0  # as it is
    model.steps_taken += 1
    model.note = "new"
    model._private = 1
    model.body.training = False
    model.eval().train().to(torch.float64)


@pytest.mark.parametrize("path", ["conv", "blocks.1.linear", "blocks.0"])
def test_a_module_put_in_the_place_of_another_is_named(path: str) -> None:
    model: Any = rewrite(Net(), SPEC, capture="graph")
    parent, _, name = path.rpartition(".")
    fresh = {"conv": nn.Conv1d(2, 2, 1), "blocks.1.linear": nn.Linear(6, 6), "blocks.0": Block()}[path]
    setattr(model.get_submodule(parent), name, fresh)
    named = f"{path}.linear" if path == "blocks.0" else path
    for use in (lambda: model(x), lambda: rewrite(model, SPEC)):
        with pytest.raises(RewriterError, match=f"{named} was replaced or removed .*computes the weight.*bake\\(\\)"):
            use()
    taken = bake(model)
    taken(x).sum().backward()
    assert next(taken.get_submodule(path).parameters()).grad is not None
    rewrite(taken, SPEC, capture="graph")(x)


def test_a_graph_that_read_the_tensor_of_another_module_is_not_baked() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.linear.weight

    model: Any = rewrite(torch.fx.symbolic_trace(Reads()), SPEC)
    model.linear = nn.Linear(6, 6)
    with pytest.raises(RewriterError, match="linear was replaced"):
        bake(model)


def test_an_error_of_the_model_itself_stays() -> None:
    class Wrong(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x.nothing  # type: ignore[attr-defined, no-any-return]

    plain = Net()
    plain.head = Wrong(6, 3)
    with pytest.raises(AttributeError, match="nothing"):
        rewrite(plain, SPEC, capture="module")(x)
    graph: Any = rewrite(Net(), SPEC, capture="graph")
    graph.head = Wrong(6, 3)
    with pytest.raises(AttributeError, match="nothing"):
        graph(x)


def test_a_part_of_the_model_called_by_itself_is_one_forward() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    model: Any = rewrite(nn.Sequential(Twice()), SPEC, capture="graph")
    seen: list[int] = []
    part = model.get_submodule("0")
    part.linear.parametrizations.weight.steps[0].register_forward_hook(lambda *_: seen.append(1))
    part(torch.randn(2, 6))
    assert seen == [1]


class Tied(nn.Module):
    """Has a weight that is computed from another one, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(4, 3, bias=False)])
        self.out = nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner[0](x))


TIED = {
    "reparam": 1,
    "rules": [{"name": "t", "select": "out.weight", "from": "inner.0.weight", "chain": ["transpose"]}],
}


def test_a_module_from_whose_tensors_a_chain_computes_is_not_replaced(capture: str) -> None:
    model: Any = rewrite(Tied(), TIED, capture=capture)
    x = torch.ones(1, 4)
    before = model(x)
    with pytest.raises(RewriterError, match=r"out\.weight is computed from inner\.0\.weight.*called inner now: bake"):
        model.inner = nn.ModuleList([nn.Linear(4, 3, bias=False)])
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(bake(model)(x), before)
    model.inner[0] = nn.Linear(4, 3, bias=False)
    for broken in (model, nn.Sequential(model)):
        with pytest.raises(RewriterError, match=r"out\.weight is computed from inner\.0\.weight, .* was replaced"):
            bake(broken)
    assert torch.equal(get_value(model.out, "weight"), bake(model.out).weight)


class Shares(nn.Module):
    """Has modules of two names each, one of them in a list, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.one = nn.Linear(4, 4)
        self.layers = nn.ModuleList([self.one, self.act, nn.Linear(4, 4)])
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.act, self.one, *self.layers):
            x = layer(x)
        return self.tied(x)


def _replace(model: Any, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


ONE = {"reparam": 1, "rules": [{"name": "w", "select": "one.weight", "chain": ["weight_norm"]}]}
SHARED = {
    "act": ("layers.1", nn.Tanhshrink()),
    "act by its first name": ("act", nn.Tanhshrink()),
    "owner": ("layers.0", nn.Linear(4, 4)),
    "owner of a tied weight": ("tied", nn.Linear(4, 4)),
}


@pytest.mark.parametrize("called", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", SHARED)
def test_a_module_of_two_names_is_not_replaced_under_one(kind: str, called: bool) -> None:
    path, module = SHARED[kind]
    model: Any = rewrite(Shares(), ONE)
    x, expected = torch.randn(3, 4), bake(model)
    if called:
        model(x)
    _replace(expected, path, module)
    _replace(model, path, module)
    for use in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RewriterError, match=r"(were one module|was replaced or removed) .*bake\(\) the model"):
            use(x)
    torch.testing.assert_close(bake(model)(x), expected(x))


def test_a_module_of_two_names_is_replaced_under_both() -> None:
    model: Any = rewrite(Shares(), ONE)
    x = torch.randn(3, 4)
    before = model(x)
    model.act = model.layers[1] = nn.ReLU()
    assert not torch.equal(model(x), before)
    torch.testing.assert_close(bake(model)(x), model(x))
