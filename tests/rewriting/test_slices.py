"""`per` with `only`: a chain on some chunks of a fused tensor, the others plain."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rewriter import PlanError, SpecError, bake, load_spec, plan, rewrite
from rewriter.io import load_model, save_model
from rewriter.state import check_optimizer, convert_state_dict, get_value, set_value, update

D = 4
X = torch.linspace(-1, 1, 3 * D, dtype=torch.float64).reshape(3, D)


class Fused(nn.Module):
    """One tensor of q, k and v along its second dimension, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Parameter(torch.randn(D, 3 * D))
        self.out = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ self.attn).chunk(3, -1)
        return self.out(torch.softmax(q @ k.mT, -1) @ v)


def rules(*chain: Any, only: Any = (0, 2), **options: Any) -> dict[str, Any]:
    rule = {"name": "qv", "select": "attn", "per": {"dim": 1, "chunks": 3, "only": list(only)}, "chain": list(chain)}
    return {"reparam": 1, "rules": [{**rule, **options}]}


def chunks(model: nn.Module) -> tuple[Tensor, ...]:
    return get_value(model, "attn").chunk(3, 1)


@pytest.mark.parametrize("only", [[0, 2], [2, 0], [1], [0]])
def test_the_chain_computes_the_chosen_chunks_alone(capture: str, only: list[int]) -> None:
    model = Fused().double()
    before = model.attn.detach().chunk(3, 1)
    new = rewrite(model, rules({"scale": {"factor": 2.0}}, only=only, init="raw"), capture=capture)
    for index, (chunk, was) in enumerate(zip(chunks(new), before, strict=True)):
        torch.testing.assert_close(chunk, 2 * was if index in only else was)
    expected = copy.deepcopy(model)
    expected.attn.data = get_value(new, "attn")
    torch.testing.assert_close(new(X), expected(X))
    again = bake(rewrite(model, rules({"scale": {"factor": 2.0}}, only=only), capture=capture))
    torch.testing.assert_close(again.attn, model.attn)
    assert again.attn.is_contiguous()


@pytest.mark.parametrize(
    ("step", "shapes"),
    [
        ("symmetric", [(D, 2 * D), (D, D)]),
        ("weight_norm", [(2, D, 1), (2, D, D), (D, D)]),
        ({"orthogonal": {"map": "cayley"}}, [(D, 2 * D), (D, D)]),
    ],
)
def test_it_stores_the_chosen_chunks_and_the_rest(capture: str, step: Any, shapes: list[tuple[int, ...]]) -> None:
    model = Fused().double()
    new = rewrite(model, rules(step), capture=capture)
    site = new.get_submodule("parametrizations.attn")
    assert [tuple(original.shape) for original in site.originals] == shapes
    torch.testing.assert_close(site.originals[-1], model.attn[:, D : 2 * D])
    torch.testing.assert_close(chunks(new)[1], model.attn[:, D : 2 * D].detach())


def reference(step: str) -> nn.Module:
    """The same by hand with torch: three layers, whose weights are transposed chunks."""
    if step == "weight_norm":
        return parametrizations.weight_norm(nn.Linear(D, D, bias=False), dim=1)
    return nn.utils.parametrize.register_parametrization(nn.Linear(D, D, bias=False), "weight", Symmetric())


class Symmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.triu() + X.triu(1).T

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


@pytest.mark.parametrize("step", ["weight_norm", "symmetric"])
def test_gradients_are_those_of_separate_tensors(capture: str, step: str) -> None:
    model = Fused().double()
    q, v = reference(step).double(), reference(step).double()
    start = model.attn.detach()
    if step == "symmetric":
        start[:, :D] += start[:, :D].T.clone()
        start[:, 2 * D :] += start[:, 2 * D :].T.clone()
    q.weight, v.weight = start[:, :D].T.clone(), start[:, 2 * D :].T.clone()
    k = start[:, D : 2 * D].clone().requires_grad_()
    new = rewrite(model, rules(step), capture=capture)
    mixed = torch.softmax(q(X) @ (X @ k).mT, -1) @ v(X)
    (mixed @ model.out.weight.T + model.out.bias).square().sum().backward()
    new(X).square().sum().backward()
    *own, rest = new.get_submodule("parametrizations.attn").originals
    torch.testing.assert_close(rest.grad, k.grad, rtol=1e-10, atol=1e-10)
    sides = [q.parametrizations.weight, v.parametrizations.weight]
    if step == "weight_norm":
        stored = [[side.original0, side.original1] for side in sides]
        wanted = [torch.stack([one.grad.T for one in part]) for part in zip(*stored, strict=True)]
        found = [one.grad for one in own]
    else:  # the gradient of the matrix below and above the diagonal together, whichever half is stored
        wanted = [torch.cat([side.original.grad.triu() for side in sides], 1)]
        found = [torch.cat([one.triu() + one.tril(-1).T for one in own[0].grad.chunk(2, 1)], 1)]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", ["symmetric", "weight_norm", {"orthogonal": {"map": "cayley"}}, {"lora": {"r": 2}}])
def test_values_and_states_go_in_and_out(capture: str, step: Any) -> None:
    model = Fused().double()
    new, other = (rewrite(one, rules(step), capture=capture) for one in (model, Fused().double()))
    other.load_state_dict(new.state_dict())
    torch.testing.assert_close(get_value(other, "attn"), get_value(new, "attn"))
    plain = convert_state_dict(new.state_dict(), new, to="plain")
    torch.testing.assert_close(plain["attn"], get_value(new, "attn"))
    fresh = rewrite(Fused().double(), rules(step), capture=capture)
    fresh.load_state_dict(plain)
    torch.testing.assert_close(get_value(fresh, "attn"), plain["attn"])
    square = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    square = square + square.T if step == "symmetric" else square * torch.linalg.det(square)
    value = torch.cat([square, torch.randn(D, D, dtype=torch.float64), square], 1)
    set_value(new, "attn", value)
    torch.testing.assert_close(get_value(new, "attn"), value)
    other.attn = value
    torch.testing.assert_close(bake(other).attn.detach(), value)
    if step != "weight_norm" and not isinstance(step, dict):
        with pytest.raises(PlanError, match="cannot be set to this value"):
            set_value(new, "attn", torch.randn(D, 3 * D, dtype=torch.float64))
        torch.testing.assert_close(get_value(new, "attn"), value)


@pytest.mark.parametrize("inplace", [False, True])
def test_bake_gives_the_plain_tensor_back(capture: str, inplace: bool) -> None:
    model = Fused().double()
    before = model.attn.detach().clone()
    new = rewrite(model, rules("weight_norm"), capture=capture, inplace=inplace)
    baked = bake(new, inplace=inplace)
    torch.testing.assert_close(baked.attn.detach(), before)
    assert isinstance(baked.attn, nn.Parameter)
    assert baked.attn.requires_grad
    assert list(baked.state_dict()) == ["attn", "out.weight", "out.bias"]
    undone = bake(
        rewrite(baked, rules({"orthogonal": {"map": "cayley"}}, init="raw"), capture=capture), keep="original"
    )
    torch.testing.assert_close(undone.attn.detach(), before)


def test_one_labelled_step_is_baked_alone(capture: str) -> None:
    model = Fused().double()
    new = rewrite(model, rules("symmetric", {"scale": {"factor": 3.0, "label": "s"}}), capture=capture)
    shorter = bake(new, only=["s"])
    torch.testing.assert_close(get_value(shorter, "attn"), get_value(new, "attn"))
    torch.testing.assert_close(shorter(X), new(X))


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_leave_the_rest_as_it_was(capture: str, trained: bool) -> None:
    model = Fused().double()
    model.attn.requires_grad_(trained)
    before = model.attn.detach().clone()
    new = rewrite(model, rules({"lora": {"r": 2}}), capture=capture)
    base, rest = new.get_submodule("parametrizations.attn").originals
    assert (base.requires_grad, rest.requires_grad) == (False, trained)
    optimizer = torch.optim.SGD([one for one in new.parameters() if one.requires_grad], lr=0.1)
    assert check_optimizer(optimizer, new) == []
    for _ in range(3):
        optimizer.zero_grad()
        new(X).square().sum().backward()
        optimizer.step()
    q, k, v = chunks(new)
    adapters = new.get_submodule("parametrizations.attn.0")
    for chunk, was, adapter in zip((q, v), (before[:, :D], before[:, 2 * D :]), adapters, strict=True):
        torch.testing.assert_close(chunk, was + adapter.scaling * adapter.lora_B @ adapter.lora_A)
        assert not torch.equal(chunk, was)
    assert torch.equal(k, before[:, D : 2 * D]) is not trained
    assert bake(new).attn.requires_grad is trained


def test_the_rest_of_a_tensor_is_no_rewritten_part() -> None:
    model = Fused()
    new = rewrite(model, {**rules("weight_norm"), "trainable": "rewritten"})
    assert [name for name, one in new.named_parameters() if one.requires_grad] == [
        "parametrizations.attn.original0",
        "parametrizations.attn.original1",
    ]
    assert all(parameter.requires_grad for parameter in bake(new).parameters())


def test_files_copies_and_updates_keep_it(capture: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(D, 3 * D).double())
    rule = {**rules({"l1_unstructured": {"amount": 3}}), "absorb": False}
    rule["rules"][0] |= {"select": "0.weight", "per": {"dim": 0, "chunks": 3, "only": [0, 2]}}
    new = rewrite(model, rule, capture=capture)
    save_model(new, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    for one in (loaded, copy.deepcopy(new)):
        torch.testing.assert_close(one(X), new(X))
        torch.testing.assert_close(bake(one).state_dict(), bake(new).state_dict())
    update(new, "qv", amount=5)
    assert [int((chunk == 0).sum()) for chunk in get_value(new, "0.weight").chunk(3)] == [5, 0, 5]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("step", ["weight_norm", {"orthogonal": {"map": "cayley"}}])
def test_torchscript_takes_it(step: Any) -> None:
    new = rewrite(Fused().double(), rules(step), capture="graph").eval()
    torch.testing.assert_close(torch.jit.script(new)(X), new(X))


def test_a_program_takes_it() -> None:
    model = Fused().double()
    program = torch.export.export(model, (X,))
    new = rewrite(program, rules("weight_norm"))
    torch.testing.assert_close(new.module()(X), model(X))
    assert "parametrizations.attn.original2" in new.state_dict
    torch.testing.assert_close(bake(new).module()(X), model(X))


def test_chunks_are_seen_as_matrices_and_sampled() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3).double())
    rule = rules("orthogonal", init="sample", reshape=["out", -1])
    rule["rules"][0] |= {"select": "0.weight", "per": {"dim": 0, "chunks": 3, "only": [1]}}
    value = get_value(rewrite(model, rule), "0.weight")
    middle = value[2:4].flatten(1)
    torch.testing.assert_close(middle @ middle.T, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(value[[0, 1, 4, 5]], model[0].weight[[0, 1, 4, 5]].detach())


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ([0, 3], "counts from 0, and the last of 3 chunks is 2"),
        ([0, 0], "names a chunk twice"),
        ([0, 1, 2], "names all chunks"),
        ([-1], "greater than or equal to 0"),
        ([], "`only` is empty"),
    ],
)
def test_wrong_chunks_are_refused_where_they_are_written(only: list[int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec(rules("symmetric", only=only))


def test_a_tensor_computed_from_another_has_no_plain_chunks() -> None:
    with pytest.raises(SpecError, match="stores no chunks"):
        load_spec(rules("symmetric", **{"from": "other"}))


def test_another_choice_is_another_parametrization(capture: str) -> None:
    new = rewrite(Fused(), rules("symmetric"), capture=capture)
    planned = plan(new, rules("symmetric"))
    assert "only=[0, 2]" in planned.sites[0].spec.options
    assert "symmetric on chunks 0, 2 of 3" in str(planned)
    assert rewrite(new, rules("symmetric", only=[2, 0])) is not None
    with pytest.raises(PlanError, match="already parametrized"):
        rewrite(new, rules("symmetric", only=[0]))
    with pytest.raises(RuntimeError, match="saved from the chain"):
        rewrite(Fused(), rules("symmetric", only=[0, 1])).load_state_dict(new.state_dict())


def test_lora_on_q_and_v_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    rule = rules({"lora": {"r": 2, "lora_alpha": 4}}, select="**.c_attn.weight", expect=2)
    new = rewrite(model, {**rule, "trainable": "rewritten"})
    torch.testing.assert_close(new(ids).logits, model(ids).logits)
    trained = {name: one for name, one in new.named_parameters() if one.requires_grad}
    assert len(trained) == 2 * 2 * 2
    with torch.no_grad():
        for one in trained.values():
            one.normal_()
    expected = copy.deepcopy(model)
    for block, plain in zip(new.transformer.h, expected.transformer.h, strict=True):
        q, v = block.get_submodule("attn.c_attn.parametrizations.weight.0")
        plain.attn.c_attn.weight.data[:, :8] += 2 * q.lora_B @ q.lora_A
        plain.attn.c_attn.weight.data[:, 16:] += 2 * v.lora_B @ v.lora_A
    torch.testing.assert_close(new(ids).logits, expected(ids).logits, rtol=1e-10, atol=1e-10)
    baked = bake(new)
    torch.testing.assert_close(baked.state_dict(), expected.state_dict(), rtol=1e-10, atol=1e-10)
    assert torch.equal(
        baked.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0),
        expected.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0),
    )
