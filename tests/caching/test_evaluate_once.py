"""Inside `evaluate_once` a chain is evaluated once and differentiated once, and the gradients are the same."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import RewriterError, evaluate_once, rewrite

Run = Callable[[nn.Module, Tensor], Any]


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _expect_same(made: Any, run: Run, evaluations: int = 1) -> None:
    """`run` gives the same gradients inside evaluate_once as outside, with one evaluation."""
    reference = copy.deepcopy(made.model)
    run(reference, made.x)

    def once() -> None:
        with evaluate_once(made.model):
            run(made.model, made.x)

    assert made.evaluations(once) == evaluations
    expected = _gradients(reference)
    assert _gradients(made.model).keys() == expected.keys()
    for name, gradient in _gradients(made.model).items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def _accumulation(model: nn.Module, x: Tensor) -> None:
    for scale in range(1, 9):
        (model(x * scale) ** 2).mean().backward()


def _two_passes(model: nn.Module, x: Tensor) -> None:
    (model(x) * model(-x)).sum().backward()


def _clipped_values(model: nn.Module, x: Tensor) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
    model(x).sum().backward()


def test_hooks_that_change_a_gradient_change_it_once(recurrent: Any) -> None:
    _expect_same(recurrent(), _clipped_values)


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("step", [{"orthogonal": {"map": "matrix_exp"}}, "weight_norm", "symmetric"])
def test_catalog_chains_get_the_same_gradients(recurrent: Any, step: Any, memory: str) -> None:
    made = recurrent(step, memory=memory, init="keep")
    _expect_same(made, _accumulation, evaluations=0)


def test_a_chain_that_reads_another_chains_value_passes_its_gradient_on(
    capture: str, spec: Any, counted: nn.Module, count: Any
) -> None:
    two = spec("0.weight", counted, init="raw")
    two["rules"].append({"name": "second", "select": "1.weight", "chain": [{"affine": {"inputs": ["0.weight"]}}]})
    model = rewrite(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double(), two, capture=capture)
    reference = copy.deepcopy(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    _accumulation(reference, x)
    count.total = 0
    with evaluate_once(model):
        _accumulation(model, x)
    assert count.total == 1
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, _gradients(reference)[name], rtol=1e-6, atol=0)


def test_state_advances_once_in_the_block(recurrent: Any) -> None:
    made = recurrent("spectral_norm")
    once = copy.deepcopy(made.model)
    with torch.no_grad():
        once(made.x)
    with evaluate_once(made.model):
        _accumulation(made.model, made.x)
    step, other = getattr(made.site, "0"), getattr(once.cell.parametrizations.weight_hh, "0")
    torch.testing.assert_close(step._u, other._u)


def test_train_and_eval_are_evaluated_apart(recurrent: Any) -> None:
    made = recurrent({"weight_dropout": {"p": 0.5}})
    with evaluate_once(made.model):
        noisy = made.model(made.x)
        made.model.eval()
        exact = made.model(made.x)
        made.model.train()
        torch.testing.assert_close(made.model(made.x), noisy)
    torch.testing.assert_close(exact, made.model.eval()(made.x))


def test_an_exception_leaves_nothing_behind(recurrent: Any) -> None:
    made = recurrent()
    with pytest.raises(KeyError), evaluate_once(made.model):
        made.model(made.x).sum().backward()
        raise KeyError
    assert made.site.original.grad is None
    assert not made.site.policy.busy
    assert [made.evaluations(), made.evaluations()] == [1, 1]


def test_the_outer_of_two_nested_blocks_ends_them(recurrent: Any) -> None:
    made = recurrent()

    def run() -> None:
        with evaluate_once(made.model):
            made.model(made.x).sum().backward()
            with evaluate_once(made.model):
                made.model(made.x).sum().backward()
            assert not made.site.original.grad.any()
            made.model(made.x).sum().backward()

    assert made.evaluations(run) == 1
    reference = copy.deepcopy(made.model)
    reference.zero_grad()
    for _ in range(3):
        reference(made.x).sum().backward()
    torch.testing.assert_close(_gradients(made.model), _gradients(reference))


def test_a_block_belongs_to_its_thread(recurrent: Any) -> None:
    made = recurrent()
    reference = copy.deepcopy(made.model)
    reference(made.x).sum().backward()
    expected = reference.cell.parametrizations.weight_hh.original.grad
    inside: dict[str, Any] = {}

    def other() -> None:
        made.model(made.x).sum().backward()
        inside["gradient"] = made.site.original.grad.clone()

    with evaluate_once(made.model):
        made.model(made.x).sum().backward()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    torch.testing.assert_close(inside["gradient"], expected)
    torch.testing.assert_close(made.site.original.grad, 2 * expected)


def test_other_parameters_are_evaluated_as_ever(recurrent: Any) -> None:
    made = recurrent()
    key = "cell.parametrizations.weight_hh.original"
    other = made.site.original.detach().clone().requires_grad_()
    expected = torch.autograd.grad(torch.func.functional_call(made.model, {key: other}, (made.x,)).sum(), other)
    with evaluate_once(made.model):
        made.model(made.x).sum().backward()
        out = torch.func.functional_call(made.model, {key: other}, (made.x,))
        torch.testing.assert_close(torch.autograd.grad(out.sum(), other), expected)
        made.model(made.x).sum().backward()
    torch.testing.assert_close(made.site.original.grad, 2 * expected[0])


def test_frozen_sites_need_no_gradient(recurrent: Any) -> None:
    made = recurrent()
    made.site.requires_grad_(False)
    _expect_same(made, _accumulation)


def test_never_stays_once_for_each_use(recurrent: Any) -> None:
    made = recurrent(cache="never")
    _expect_same(made, _two_passes, evaluations=14)


def test_an_optimizer_step_inside_is_refused_at_the_next_forward(recurrent: Any) -> None:
    made = recurrent()
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    made.site.original.grad = torch.ones_like(made.site.original)
    stale = pytest.raises(RewriterError, match=r"cell\.weight_hh.*changed inside evaluate_once")
    with stale, evaluate_once(made.model):
        made.model(made.x).sum().backward()
        optimizer.step()
        made.model(made.x)
    assert not made.site.policy.busy


def test_an_optimizer_step_inside_is_refused_at_the_end(recurrent: Any) -> None:
    made = recurrent()
    with pytest.raises(RewriterError, match="Step the optimizer"), evaluate_once(made.model):
        made.model(made.x).sum().backward()
        with torch.no_grad():
            made.site.original.add_(1)
    assert made.site.original.grad is None


def test_a_conversion_inside_is_refused(recurrent: Any) -> None:
    made = recurrent()
    with pytest.raises(RewriterError, match="changed inside"), evaluate_once(made.model):
        made.model(made.x).sum().backward()
        made.model.float()


def test_a_model_without_chains_is_left_alone(plain: Any) -> None:
    model = plain().double()
    with evaluate_once(model):
        model(torch.randn(3, 7, 4, dtype=torch.float64)).sum().backward()
    assert model.cell.weight_hh.grad is not None


def test_a_wrapped_model_is_taken(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        rule = {"name": "s", "select": "0.weight", "chain": ["symmetric"]}
        model = rewrite(nn.Sequential(nn.Linear(3, 3)), {"reparam": 1, "rules": [rule]})
        parallel = nn.parallel.DistributedDataParallel(model)
        with evaluate_once(parallel):
            with parallel.no_sync():
                parallel(torch.ones(1, 3)).sum().backward()
            parallel(torch.ones(1, 3)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_reads_outside_of_forwards_are_the_one_value_too(recurrent: Any) -> None:
    def reads(model: nn.Module, x: Tensor) -> None:
        cell = model.cell
        (model(x).sum() + cell.weight_hh.square().sum()).backward()
        cell.weight_hh.sum().backward()

    _expect_same(recurrent(), reads)
    for made in (recurrent(), recurrent("symmetric")):
        with evaluate_once(made.model):
            if made.site.spec.chain != ("symmetric",):  # a step of its own could advance a state
                made.model(made.x)
            assert made.model.cell.weight_hh is made.model.cell.weight_hh


def test_a_write_to_the_one_value_is_an_error(recurrent: Any) -> None:
    made = recurrent()
    with pytest.raises(RewriterError, match=r"cell\.weight_hh: its value was written to"), evaluate_once(made.model):
        made.model(made.x)
        with torch.no_grad():
            made.model.cell.weight_hh.clamp_(-0.1, 0.1)
        made.model(made.x)
