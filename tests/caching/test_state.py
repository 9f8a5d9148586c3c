"""Reading, setting and freezing values, and taking an optimizer along."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import PlanError, bake, rewrite
from rewriter.state import freeze, get_value, remap_optimizer, set_value, unfreeze


def test_reading_a_value_advances_nothing(recurrent: Any) -> None:
    made = recurrent("spectral_norm")
    before = copy.deepcopy(made.model.state_dict())
    value = get_value(made.model, "cell.weight_hh")
    torch.testing.assert_close(value, bake(made.model).cell.weight_hh.detach())
    torch.testing.assert_close(made.model.state_dict(), before, rtol=0, atol=0)
    random = torch.get_rng_state()
    get_value(recurrent({"weight_dropout": {"p": 0.5}}).model, "cell.weight_hh")
    assert not get_value(made.model, "head.weight").requires_grad
    assert random.numel() == torch.get_rng_state().numel()


def test_a_name_that_is_not_there_is_answered_with_the_nearest(recurrent: Any) -> None:
    with pytest.raises(PlanError, match=r"did you mean .*cell\.weight_hh"):
        get_value(recurrent().model, "cell.weight_h")


def test_a_frozen_value_is_cached_and_not_trained(recurrent: Any) -> None:
    made = recurrent()
    getattr(made.site, "0").scale.requires_grad_(False)
    before = made.fresh()
    freeze(made.model)
    freeze(made.model, only=["cell.weight_hh"])
    assert [made.evaluations(), made.evaluations()] == [0, 0]
    made.model(made.x).sum().backward()
    assert made.site.original.grad is None
    with torch.no_grad():
        made.site.original.add_(1)
        torch.testing.assert_close(made.model(made.x), before)
        unfreeze(made.model)
        assert made.site.original.requires_grad
        assert not getattr(made.site, "0").scale.requires_grad
        torch.testing.assert_close(made.model(made.x), made.fresh())


def test_a_frozen_value_does_not_advance_its_state_in_train_mode(recurrent: Any) -> None:
    made = recurrent("spectral_norm")
    freeze(made.model)
    before = getattr(made.site, "0")._u.clone()
    made.model(made.x)
    assert torch.equal(getattr(made.site, "0")._u, before)


def test_a_frozen_value_follows_conversion_loading_and_assignment(recurrent: Any) -> None:
    made = recurrent("symmetric")
    other = recurrent("symmetric")
    freeze(made.model)
    made.model.load_state_dict(other.model.state_dict())
    torch.testing.assert_close(made.model(made.x), other.model(made.x))
    set_value(made.model, "cell.weight_hh", torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(get_value(made.model, "cell.weight_hh"), torch.eye(5, dtype=torch.float64))
    made.model.float()
    assert made.model(made.x.float()).dtype == torch.float32


def test_copies_of_a_frozen_model_are_frozen_and_can_be_unfrozen(recurrent: Any) -> None:
    made = recurrent()
    freeze(made.model)
    stream = io.BytesIO()
    torch.save(made.model, stream)
    stream.seek(0)
    for clone in (copy.deepcopy(made.model), torch.load(stream, weights_only=False)):
        torch.testing.assert_close(clone(made.x), made.model(made.x))
        site = clone.cell.parametrizations.weight_hh
        assert made.evaluations(lambda clone=clone: clone(made.x)) == 0
        unfreeze(clone)
        assert site.original.requires_grad
    assert not made.site.original.requires_grad


def test_a_frozen_model_bakes_to_its_values_and_trains_again(recurrent: Any) -> None:
    made = recurrent()
    freeze(made.model)
    plain = bake(made.model)
    torch.testing.assert_close(plain(made.x), made.model(made.x))
    assert plain.cell.weight_hh.requires_grad


@pytest.mark.parametrize("inplace", [True, False])
def test_a_frozen_model_bakes_to_its_values_after_its_tensors_changed(recurrent: Any, inplace: bool) -> None:
    made = recurrent()
    freeze(made.model)
    before = made.model(made.x)
    with torch.no_grad():
        made.site.original.mul_(2)
    torch.testing.assert_close(made.model(made.x), before)
    torch.testing.assert_close(bake(made.model, inplace=inplace)(made.x), before)


def test_an_optimizer_makes_no_step_with_gradients_from_before_freeze(recurrent: Any) -> None:
    made = recurrent()
    optimizer = torch.optim.SGD(made.model.parameters(), lr=1.0)
    made.model(made.x).sum().backward()
    before = get_value(made.model, "cell.weight_hh")
    freeze(made.model)
    optimizer.step()
    unfreeze(made.model)
    assert torch.equal(get_value(made.model, "cell.weight_hh"), before)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.LBFGS])
@pytest.mark.parametrize("inplace", [True, False])
def test_an_optimizer_goes_along_with_its_state(capture: str, spec: Any, plain: Any, kind: Any, inplace: bool) -> None:
    model, x = plain().double(), torch.randn(3, 7, 4, dtype=torch.float64)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.05, **options)
    loss = lambda: model(x).square().sum()  # noqa: E731
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step(loss) if kind is torch.optim.LBFGS else optimizer.step()
    before = model
    bias = model.head.bias
    new = rewrite(model, spec("cell.weight_hh", "weight_norm"), capture=capture, inplace=inplace)
    if inplace:
        return _moved_in_place(optimizer, bias, new)
    history = pytest.warns(UserWarning, match="starts without history") if kind is torch.optim.LBFGS else nullcontext()
    with history:
        remapped = remap_optimizer(optimizer, before, new)
    assert type(remapped) is kind
    assert {id(p) for p in remapped.param_groups[0]["params"]} == {id(p) for p in new.parameters()}
    assert remapped.param_groups[0]["lr"] == 0.05
    if kind is torch.optim.LBFGS:
        return
    torch.testing.assert_close(remapped.state[new.head.bias], optimizer.state[before.head.bias])
    assert remapped.state[new.head.bias] is not optimizer.state[before.head.bias]
    _step(new, remapped, x)
    assert len(remapped.state) == len(list(new.parameters()))
    assert id(new.head.bias) not in {id(parameter) for parameter in optimizer.state}


def _moved_in_place(optimizer: torch.optim.Optimizer, bias: nn.Parameter, new: nn.Module) -> None:
    assert new.head.bias is bias
    if not isinstance(optimizer, torch.optim.LBFGS):
        remapped = remap_optimizer(optimizer, new, new)
        assert remapped.state.get(bias) is optimizer.state.get(bias)


def test_an_optimizer_of_another_model_is_refused(plain: Any) -> None:
    optimizer = torch.optim.SGD(plain().parameters(), lr=0.1)
    model = plain()
    with pytest.raises(Exception, match="not in the first model"):
        remap_optimizer(optimizer, model, model)
