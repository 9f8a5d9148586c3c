"""With ``cache: version`` a value is cached across forwards, for exactly as long as it is valid."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.state import invalidate, set_value


def _cached(recurrent: Any) -> Any:
    made = recurrent(cache="version")
    with torch.no_grad():
        made.model(made.x)
        assert made.evaluations() == 0
    return made


def test_a_value_is_cached_across_forwards_without_gradients(recurrent: Any) -> None:
    made = recurrent(cache="version")
    with torch.no_grad():
        assert [made.evaluations() for _ in range(3)] == [1, 0, 0]
        torch.testing.assert_close(made.model(made.x), made.fresh())


def test_a_value_is_evaluated_in_every_forward_that_records_gradients(recurrent: Any) -> None:
    made = recurrent(cache="version")
    assert [made.evaluations() for _ in range(3)] == [1, 1, 1]
    made.model(made.x).sum().backward()
    made.model(made.x).sum().backward()


def test_a_frozen_model_caches_its_values_with_gradients_on(recurrent: Any) -> None:
    made = recurrent(cache="version")
    made.model.requires_grad_(False)
    made.x.requires_grad_()
    assert [made.evaluations() for _ in range(3)] == [1, 0, 0]
    made.site.original.requires_grad_()
    assert made.evaluations() == 1
    assert made.model(made.x).requires_grad


def _in_place(made: Any) -> None:
    with torch.no_grad():
        made.site.original.add_(1)


def _swap_data(made: Any) -> None:
    made.site.original.data = made.site.original.detach() + 1


def _swap_data_for_its_transpose(made: Any) -> None:
    made.site.original.data = made.site.original.data.T


def _swap_parameter(made: Any) -> None:
    made.site.original = nn.Parameter(made.site.original.detach() + 1)


def _load(made: Any) -> None:
    made.model.load_state_dict({key: value + 1 for key, value in made.model.state_dict().items()})


def _load_assigned(made: Any) -> None:
    made.model.load_state_dict({key: value + 1 for key, value in made.model.state_dict().items()}, assign=True)


def _step_parameter(made: Any) -> None:
    with torch.no_grad():
        getattr(made.site, "0").scale.mul_(2)


def _step_buffer(made: Any) -> None:
    getattr(made.site, "0").shift.fill_(3)


def _step_setting(made: Any) -> None:
    getattr(made.site, "0").power = 3.0


def _mode_of_a_step(made: Any) -> None:
    made.model.eval()


def _convert(made: Any) -> None:
    made.model.float()
    made.x = made.x.float()


def _write_through_data(made: Any) -> None:
    made.site.original.data.add_(1)
    invalidate(made.model)


def _write_into_the_value(made: Any) -> None:
    (kept,) = made.site.policy.cached.values()
    kept.value.add_(1)


CHANGES = [
    _in_place,
    _swap_data,
    _swap_data_for_its_transpose,
    _swap_parameter,
    _load,
    _load_assigned,
    _step_parameter,
    _step_buffer,
    _step_setting,
    _mode_of_a_step,
    _convert,
    _write_through_data,
    _write_into_the_value,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_any_change_of_what_a_value_depends_on_invalidates_it(recurrent: Any, change: Callable[[Any], None]) -> None:
    made = _cached(recurrent)
    change(made)
    with torch.no_grad():
        expected = made.fresh()
        assert made.evaluations() == 1
        torch.testing.assert_close(made.model(made.x), expected)


def test_every_new_mode_is_a_new_evaluation(recurrent: Any) -> None:
    made = _cached(recurrent)
    with torch.inference_mode():
        assert [made.evaluations(), made.evaluations()] == [1, 0]
    with torch.no_grad():
        assert made.evaluations() == 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert [made.evaluations(), made.evaluations()] == [1, 0]


def test_a_value_cached_in_inference_mode_is_an_ordinary_tensor(recurrent: Any) -> None:
    made = recurrent(cache="version")
    with torch.inference_mode():
        made.model(made.x)
    (kept,) = made.site.policy.cached.values()
    assert not kept.value.is_inference()


def test_tensors_made_in_inference_mode_are_not_cached(recurrent: Any) -> None:
    with torch.inference_mode():
        made = recurrent(cache="version")
        made.site.original = torch.nn.Parameter(made.site.original.clone())
        assert [made.evaluations(), made.evaluations()] == [1, 1]
        made.site.original.mul_(2)
        torch.testing.assert_close(made.model(made.x), made.fresh())


def test_functional_call_with_other_parameters_gets_their_value(recurrent: Any) -> None:
    made = _cached(recurrent)
    key = "cell.parametrizations.weight_hh.original"
    other = {key: made.site.original.detach() + 1}
    with torch.no_grad():
        mine = made.model(made.x)
        theirs = torch.func.functional_call(made.model, other, (made.x,))
        torch.testing.assert_close(made.model(made.x), mine)
        made.site.original.add_(1)
        torch.testing.assert_close(made.fresh(), theirs)


def test_a_copy_shares_no_cached_value(recurrent: Any) -> None:
    made = _cached(recurrent)
    with torch.no_grad():
        clone = copy.deepcopy(made.model)
        assert not clone.cell.parametrizations.weight_hh.policy.cached
        made.site.original.add_(1)
        assert not torch.equal(clone(made.x), made.model(made.x))
        stream = io.BytesIO()
        torch.save(made.model, stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=False)
        assert not loaded.cell.parametrizations.weight_hh.policy.cached
        torch.testing.assert_close(loaded(made.x), made.model(made.x))


def test_no_address_is_mistaken_for_another_models(recurrent: Any) -> None:
    """torch's cache is keyed by id(): a model made where a dead one was gets the dead one's weights."""
    for scale in range(5):
        made = recurrent(cache="version")
        with torch.no_grad():
            made.site.original.mul_(scale)
            made.model(made.x)
            torch.testing.assert_close(made.model(made.x), made.fresh())
        del made


@pytest.mark.parametrize("step", ["weight_dropout", "spectral_norm"])
def test_random_and_stateful_chains_are_cached_in_eval_mode_only(recurrent: Any, step: str) -> None:
    made = recurrent({step: {"p": 0.5}} if step == "weight_dropout" else step, cache="version")
    with torch.no_grad():
        made.model(made.x)
        assert not made.site.policy.cached
        made.model.eval()
        made.model(made.x)
        assert made.site.policy.cached


class _Undeclared(nn.Module):
    """Draws and counts, and says neither."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, X: Tensor) -> Tensor:
        if self.kind == "random":
            return X + torch.rand_like(X)
        self.seen += 1
        return X * self.seen


@pytest.mark.parametrize("kind", ["random", "stateful"])
def test_a_chain_that_draws_or_advances_undeclared_is_not_cached(recurrent: Any, kind: str) -> None:
    made = recurrent(_Undeclared(kind), cache="version")
    with torch.no_grad():
        assert not torch.equal(made.model(made.x), made.model(made.x))


def test_set_value_and_assignment_are_seen(recurrent: Any) -> None:
    made = recurrent("symmetric", cache="version")
    with torch.no_grad():
        made.model(made.x)
        set_value(made.model, "cell.weight_hh", torch.eye(5, dtype=torch.float64))
        torch.testing.assert_close(made.model(made.x), made.fresh())
        made.model.cell.weight_hh = 2 * torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(made.model(made.x), made.fresh())


def test_fake_tensors_are_never_cached(recurrent: Any) -> None:
    from torch._subclasses import FakeTensorMode

    made = recurrent(cache="version")
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        made.model(made.x)
    assert not made.site.policy.cached
    with torch.no_grad():
        torch.testing.assert_close(made.model(made.x), made.fresh())
