"""With ``cache: version``: what is added to a step, or takes place under its tensors, invalidates a cached value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Gathers(nn.Module):
    """Multiplies by all that it holds, whatever that is; in the beginning it may be nothing."""

    def __init__(self, filled: bool) -> None:
        super().__init__()
        if filled:
            for add in (_parameter, _buffer, _submodule):
                add(self)

    def forward(self, X: Tensor) -> Tensor:
        factors = [*self._parameters.values(), *self._buffers.values(), *vars(self).get("factors", ())]
        for factor in factors:
            X = X * factor
        for child in self.children():
            X = child(X)
        return X


class Doubles(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return 2 * X


def _free(places: dict[str, Any]) -> str:
    return f"added{len(places)}"


def _parameter(step: nn.Module) -> None:
    step.register_parameter(_free(step._parameters), nn.Parameter(torch.tensor(1.5)))


def _buffer(step: nn.Module) -> None:
    step.register_buffer(f"{_free(step._buffers)}_b", torch.tensor(2.5))


def _submodule(step: nn.Module) -> None:
    step.add_module(f"{_free(step._modules)}_m", Doubles())


def _attribute(step: nn.Module) -> None:
    step.factors = (3.0,)


def _hook(step: nn.Module) -> None:
    step.register_forward_hook(lambda module, args, result: 2 * result)


def _pre_hook(step: nn.Module) -> None:
    step.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def _hook_of_all_modules_of_a_step(step: nn.Module) -> None:
    for module in step.modules():
        _hook(module)


ADDITIONS = [_parameter, _buffer, _submodule, _attribute, _hook, _pre_hook, _hook_of_all_modules_of_a_step]


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("add", ADDITIONS, ids=lambda add: add.__name__.strip("_"))
def test_what_is_added_to_a_step_is_a_change(recurrent: Any, add: Callable[[nn.Module], None], filled: bool) -> None:
    made = recurrent(Gathers(filled), cache="version")
    with torch.no_grad():
        before = made.model(made.x)
        torch.testing.assert_close(made.model(made.x), before, rtol=0, atol=0)
        add(made.site.steps[0])
        expected = made.fresh()
        assert not torch.allclose(expected, before)
        torch.testing.assert_close(made.model(made.x), expected, rtol=0, atol=0)


def test_memory_that_was_moved_and_written_to_is_a_change(recurrent: Any) -> None:
    made = recurrent(Gathers(True), cache="version")
    with torch.no_grad():
        made.model(made.x)
        storage = made.site.original.untyped_storage()
        storage.resize_(1 << 22)  # as sharding does: the tensor's memory is elsewhere from now on
        made.site.original.data.zero_()  # which no counter counts
        torch.testing.assert_close(made.model(made.x), made.fresh(), rtol=0, atol=0)
