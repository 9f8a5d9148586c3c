"""Random models: layers shared, tied and called in any order, under random chains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import bake, rewrite
from rewriter.passes import print_graph

WIDTH = 3


class Random(nn.Module):
    """A program over a stack of tensors: each instruction calls a layer or uses a tensor directly."""

    def __init__(self, layers: int, ties: list[tuple[int, int]], program: list[tuple[str, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=index % 2 == 0) for index in range(layers))
        self.direct = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        for one, other in ties:
            self.layers[one % layers].weight = self.layers[other % layers].weight
        self.program = tuple(program)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for operation, index in self.program:
            if operation == "layer":
                seen.append(torch.tanh(self.layers[index % len(self.layers)](seen[-1])))
            elif operation == "direct":
                seen.append(seen[-1] @ self.direct[index % 2])
            elif operation == "both":
                seen.append(seen[-1] @ (self.direct[0] - self.layers[index % len(self.layers)].weight.T))
            else:
                seen.append(seen[-1] + seen[index % len(seen)])
        return seen[-1]


operations = st.tuples(st.sampled_from(["layer", "direct", "both", "add"]), st.integers(0, 9))
models = st.builds(
    Random,
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=2),
    st.lists(operations, min_size=1, max_size=8),
)
steps = st.sampled_from(["symmetric", "skew", "weight_norm", {"scale": {"factor": 0.5}}, {"shift": {"offset": 0.25}}])
rules = st.fixed_dictionaries(
    {
        "select": st.sampled_from(["layers.*.weight", "**", ["direct.0", "layers.0.weight"], "direct.*"]),
        "chain": st.lists(steps, min_size=1, max_size=3),
        "cache": st.sampled_from(["forward", "never", "version"]),
        "init": st.just("keep"),
    }
)


def by_hand(model: Random, new: nn.Module) -> Random:
    """The plain model with the values that the chains compute, one by one."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            owner, _, tensor = name.rpartition(".")
            parameter.copy_(getattr(new.get_submodule(owner), tensor))
    return plain


@settings(max_examples=30)
@given(models, rules, st.sampled_from(["graph", "module"]), st.integers(0, 2**16))
def test_any_model_under_any_chain_equals_the_plain_one(
    model: Random, rule: dict[str, Any], capture: str, seed: int
) -> None:
    torch.manual_seed(seed)
    model = model.double()
    if rule["select"] == "**":
        rule = {**rule, "select": {"path": "**", "ndim": 2}}
    spec = {"reparam": 1, "rules": [{"name": "r", **rule}]}
    new = rewrite(model, spec, capture=capture)
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    plain = by_hand(model, new)
    torch.testing.assert_close(new(x), plain(x), rtol=1e-10, atol=1e-10)

    new(x).sum().backward()
    plain(x).sum().backward()
    for name, parameter in new.named_parameters():
        if "parametrizations" not in name and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-9, atol=1e-9)

    baked = bake(new)
    assert type(baked) is Random
    assert list(baked.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(baked(x), plain(x), rtol=1e-10, atol=1e-10)
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(dict(baked.named_parameters())) == len(names), "a tie was lost"
    if capture == "graph" and rule["cache"] == "forward":
        printed = print_graph(new)
        assert all(printed.count(f"evaluate {name}:") <= 1 for name, _ in model.named_parameters())
