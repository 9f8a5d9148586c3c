"""With ``memory: recompute`` a chain runs again in backward, exactly as it ran in forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import RewriterError
from rewriter.passes import print_graph


def test_the_chain_runs_again_in_backward_and_only_then(recurrent: Any) -> None:
    made = recurrent(memory="recompute")
    assert made.evaluations() == 1
    out = made.model(made.x)
    assert made.evaluations(lambda: out.sum().backward()) == 1
    with torch.no_grad():
        assert made.evaluations() == 1


@pytest.mark.parametrize(
    "step", ["weight_norm", "spectral_norm", {"weight_dropout": {"p": 0.5}}, {"orthogonal": {"map": "cayley"}}]
)
def test_values_gradients_and_states_are_those_of_keeping(recurrent: Any, step: Any) -> None:
    torch.manual_seed(3)
    again = recurrent(step, memory="recompute", init="keep")
    torch.manual_seed(3)
    kept = recurrent(step, init="keep")
    for made in (again, kept):
        torch.manual_seed(4)
        losses = [made.model(made.x).square().sum() for _ in range(2)]
        torch.rand(5)
        for loss in losses:
            loss.backward()
    for one, other in zip(again.model.parameters(), kept.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(again.model.state_dict(), kept.model.state_dict())


class _Wide(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        for _ in range(20):
            X = torch.sin(X)
        return X


def test_intermediates_are_not_saved_for_backward(recurrent: Any) -> None:
    def saved(made: Any) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made.site()
        return sum(sizes)

    assert saved(recurrent(_Wide())) == 20 * 25
    assert saved(recurrent(_Wide(), memory="recompute")) == 0


def test_a_change_between_forward_and_backward_is_an_error(recurrent: Any) -> None:
    made = recurrent(memory="recompute")
    loss = made.model(made.x).sum()
    with torch.no_grad():
        made.site.original.add_(1)
    with pytest.raises(RewriterError, match="modified between forward and backward"):
        loss.backward()


def test_functional_call_is_differentiated_at_the_tensors_it_was_given(recurrent: Any) -> None:
    made, key = recurrent(memory="recompute"), "cell.parametrizations.weight_hh.original"
    other = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    out = torch.func.functional_call(made.model, {key: other}, (made.x,))
    (gradient,) = torch.autograd.grad(out.sum(), other)
    reference = copy.deepcopy(made.model)
    with torch.no_grad():
        reference.cell.parametrizations.weight_hh.original.copy_(other)
    reference(made.x).sum().backward()
    torch.testing.assert_close(gradient, reference.cell.parametrizations.weight_hh.original.grad)


def test_transforms_of_torch_func_evaluate_as_ever(recurrent: Any) -> None:
    made = recurrent(memory="recompute")
    parameters = dict(made.model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(made.model, parameters, (made.x,)).sum()

    gradients = torch.func.grad(loss)(parameters)
    made.model(made.x).sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


class _Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        self.seen += 1
        return X * self.seen


def test_a_state_that_advances_unannounced_is_refused(recurrent: Any) -> None:
    made = recurrent(_Silent(), memory="recompute")
    with pytest.raises(RewriterError, match="stateful = True"):
        made.model(made.x)


def test_the_graph_says_so(recurrent: Any, capture: str) -> None:
    made = recurrent(memory="recompute")
    if capture == "graph":
        assert "evaluate cell.weight_hh [recompute]: original >> Counted" in print_graph(made.model)
