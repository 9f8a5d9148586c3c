"""Called modules take their values: each site is evaluated once, wherever it is used."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rewriter import absorb, bake, plan, rewrite
from rewriter.errors import CaptureError

TOTAL: list[int] = [0]


class Counted(nn.Module):
    """Half the tensor, counted."""

    def forward(self, X: Tensor) -> Tensor:
        TOTAL[0] += 1
        return X / 2

    def right_inverse(self, X: Tensor) -> Tensor:
        return X * 2


def spec(*select: str) -> dict[str, Any]:
    return {"reparam": 1, "rules": [{"name": "r", "select": list(select), "chain": [Counted()]}]}


class Branching(nn.Module):
    """What torch.fx cannot trace; owners inside owners."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 4))
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor, *, shift: float = 0.0, both: bool = False) -> Any:
        if x.sum() > 1e9:
            raise ValueError("too large")
        out = self.inner(x) * self.scale + shift
        return {"out": out, "pair": (out, self.inner(out))} if both else out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.odd = Branching()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.odd(self.first(x), shift=0.5)
        found = self.odd(x, both=True)
        return self.last(found["out"] + found["pair"][1])


X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(autouse=True)
def uncounted() -> Iterator[None]:
    TOTAL[0] = 0
    yield


def gradients(model: nn.Module, *args: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    with parametrize.cached():
        out = model(*args)
    sum(v.pow(2).sum() for v in torch.utils._pytree.tree_leaves(out) if isinstance(v, Tensor)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: nn.Module, new: nn.Module, *args: Any) -> None:
    """Outputs equal the plain model's, and gradients are the plain ones carried through X / 2."""
    torch.manual_seed(0)
    expected = model(*args)
    torch.manual_seed(0)
    torch.testing.assert_close(new(*args), expected)
    plain, found = gradients(model, *args), gradients(new, *args)
    for name, grad in found.items():
        site = ".parametrizations." in name
        name = name.replace("parametrizations.", "").removesuffix(".original")
        torch.testing.assert_close(grad, plain[name] / 2 if site else plain[name])
    assert len(plain) == len(found)


def test_an_untraceable_module_called_twice_gets_its_values_once() -> None:
    model = Model()
    new = rewrite(model, spec("**.weight", "odd.scale"))
    found = plan(model, spec("**.weight", "odd.scale"))
    assert found.root == "graph"
    assert {site.name: site.capture for site in found} == {
        "first.weight": "inlined",
        "odd.scale": "called",
        "odd.inner.0.weight": "called",
        "odd.inner.2.weight": "called",
        "last.weight": "inlined",
    }
    TOTAL[0] = 0
    new(X)
    assert TOTAL[0] == 5
    assert_equal(model, new, X)
    baked = bake(new)
    assert [type(m) for m in baked.modules()] == [type(m) for m in model.modules()]
    assert_equal(model, rewrite(copy.deepcopy(new), spec("**.weight", "odd.scale")), X)


def test_what_surrounds_an_untraceable_module_is_still_looked_into() -> None:
    model = nn.Sequential(nn.Sequential(Branching(), nn.Sequential(Branching(), nn.Linear(4, 4))), nn.Linear(4, 4))
    found = plan(model, spec("**.weight"))
    called = ("0.0.", "0.1.0.")
    assert {site.name: site.capture for site in found} == {
        site.name: "called" if site.name.startswith(called) else "inlined" for site in found
    }
    for site in found:
        if site.capture == "called":
            assert "if x.sum() > 1e9" in site.why
    assert_equal(model, rewrite(model, spec("**.weight")), X)


def test_a_tensor_tied_inside_and_outside_is_evaluated_once() -> None:
    model = Model()
    model.last.weight = model.odd.inner[0].weight
    new = rewrite(model, spec("last.weight"))
    TOTAL[0] = 0
    out = new(X)
    assert TOTAL[0] == 1
    torch.testing.assert_close(out, model(X))
    assert_equal(model, new, X)
    baked = bake(new)
    assert baked.last.weight is baked.odd.inner[0].weight


def test_a_called_module_run_on_its_own_evaluates_on_its_own() -> None:
    model = Model()
    new = rewrite(model, spec("odd.scale"))
    new(X)
    with torch.no_grad():
        new.odd.parametrizations.scale.original.mul_(3), model.odd.scale.mul_(3)
    torch.testing.assert_close(new.odd(X), model.odd(X))


def test_an_exception_inside_leaves_nothing_behind() -> None:
    model = Model()
    new = rewrite(model, spec("**.weight", "odd.scale"))
    with pytest.raises(ValueError, match="too large"):
        new(X * 1e12)
    with torch.no_grad():
        new.odd.parametrizations.scale.original.mul_(2), model.odd.scale.mul_(2)
    TOTAL[0] = 0
    torch.testing.assert_close(new(X), model(X))
    assert TOTAL[0] == 5


def test_hooks_with_keywords_fire_once_for_each_call() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    calls: list[str] = []
    model[0].register_forward_pre_hook(
        lambda m, args, kwargs: (calls.append("before"), ((args[0] + 1,), kwargs))[1], with_kwargs=True
    )
    model[0].register_forward_hook(lambda m, args, kwargs, out: (calls.append("after"), out * 2)[1], with_kwargs=True)
    model[1].register_full_backward_hook(lambda m, given, out: calls.append("backward"))
    new = rewrite(model, spec("*.weight"))
    assert {site.capture for site in plan(model, spec("*.weight"))} == {"called"}
    expected = model(X)
    calls.clear()
    found = new(X)
    torch.testing.assert_close(found, expected)
    assert calls == ["before", "after"]
    found.sum().backward()
    assert calls == ["before", "after", "backward"]
    assert list(bake(new)[0]._forward_hooks) == list(model[0]._forward_hooks)


def test_hooks_for_all_modules_fire_once_for_each_call() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        new = rewrite(model, spec("**.weight"))
        seen.clear()
        model(X)
        expected = [name for name in seen if name != "Counted"]
        seen.clear()
        new(X)
        assert [name for name in seen if name not in ("Counted", "Site")] == expected
    finally:
        handle.remove()


def test_a_hook_added_later_fires_where_the_call_is_still_one() -> None:
    model = Model()
    new = rewrite(model, spec("odd.scale"))
    new.odd.register_forward_hook(lambda m, args, out: out * 2 if isinstance(out, Tensor) else None)
    model.odd.register_forward_hook(lambda m, args, out: out * 2 if isinstance(out, Tensor) else None)
    torch.testing.assert_close(new(X), model(X))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_transformer_layers_read_computed_weights_in_every_mode(training: bool, grad: bool) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(4, 4)).train(training)
    names = ["**.in_proj_weight", "**.linear1.weight", "**.norm2.weight", "**.out_proj.weight"]
    new = rewrite(model, spec(*names))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, site in ((name, module) for name, module in new.named_modules() if hasattr(module, "original_names")):
            site.original.mul_(1.5)
            reference.get_parameter(name.replace("parametrizations.", "")).mul_(1.5)
    x = torch.randn(2, 3, 4)
    TOTAL[0] = 0
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(new(x), reference(x))
    assert TOTAL[0] == 8


class Nested(nn.Module):
    def __init__(self, scripted: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.scripted = scripted

    def forward(self, x: Tensor) -> Tensor:
        return self.scripted(self.fc(x))


def test_a_torchscript_submodule_stays_a_node() -> None:
    model = Nested(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    new = rewrite(model, spec("fc.weight"))
    assert plan(model, spec("fc.weight")).root == "graph"
    torch.testing.assert_close(new(X), model(X))
    assert isinstance(bake(new).scripted, torch.jit.ScriptModule)


@pytest.mark.parametrize("capture", ["auto", "module"])
def test_tensors_of_a_torchscript_submodule_are_refused(capture: str) -> None:
    model = Nested(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    with pytest.raises(CaptureError, match=r"scripted\.0.*TorchScript.*before"):
        rewrite(model, spec("scripted.0.weight"), capture=capture)
    torch.testing.assert_close(model(X), model(X))


@pytest.mark.parametrize("capture", ["auto", "module", "export"])
def test_a_model_compiled_by_torchscript_is_refused(capture: str) -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(CaptureError, match=r"TorchScript.*before|ScriptModule"):
        rewrite(model, spec("0.weight"), capture=capture, example_inputs=(X,))
    torch.testing.assert_close(absorb(model)(X), model(X))


class Extended(nn.Linear):
    """A subclass with a forward of its own: not what the opener of Linear knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_a_subclass_of_a_leaf_keeps_its_own_forward() -> None:
    model = nn.Sequential(Extended(4, 4), nn.Linear(4, 4))
    assert_equal(model, rewrite(model, spec("0.weight")), X)


def test_a_leaf_with_a_further_tensor_selected_is_not_inlined() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_parameter("extra", nn.Parameter(torch.ones(2)))
    new = rewrite(model, spec("0.weight", "0.extra"))
    torch.testing.assert_close(new(X), model(X))
    torch.testing.assert_close(bake(new)[0].extra, torch.ones(2))
    torch.testing.assert_close(new[0].extra if hasattr(new, "__getitem__") else getattr(new, "0").extra, torch.ones(2))


def test_modules_in_lists_and_dicts_are_inlined() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Extended(4, 4), nn.Linear(4, 4)])
            self.named = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4))})

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.named["a"](x)

    model = Listed()
    found = plan(model, spec("**.weight"))
    assert {site.name: site.capture for site in found} == {
        "blocks.0.weight": "graph",
        "blocks.1.weight": "inlined",
        "named.a.0.weight": "inlined",
    }
    assert_equal(model, rewrite(model, spec("**.weight")), X)
