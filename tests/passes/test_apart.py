"""apart: a linear layer applies a LoRA step to its input; values and gradients are those of the whole weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rewriter import bake, evaluate_once, rewrite
from rewriter.passes import print_graph
from rewriter.state import freeze, unfreeze

CAPTURES = ("graph", "module")


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(144, 160), nn.Linear(160, 144, bias=False), nn.Linear(144, 144)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.last(torch.tanh(self.second(torch.tanh(self.first(x))))))


def _spec(**options: Any) -> dict[str, Any]:
    step = {"lora": {"r": 2, "lora_alpha": 6, **options}}
    return {
        "reparam": 1,
        "trainable": "rewritten",
        "rules": [{"name": "adapters", "select": "*.weight", "chain": [step]}],
    }


def _rewritten(capture: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    new = rewrite(_Net().to(dtype), _spec(**options), capture=capture)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
    return new


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def _gradients(model: nn.Module, x: Tensor, loss: Callable[[nn.Module, Tensor], Tensor] = _loss) -> list[Tensor]:
    x = x.clone().requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    value = loss(model, x)
    return [value.detach(), *torch.autograd.grad(value, [x, *trained])]


def _whole(model: nn.Module) -> nn.Module:
    """Return a copy that makes its weights: a hook on a step keeps it whole."""
    whole = copy.deepcopy(model)
    for module in whole.modules():
        if "lora_A" in module._parameters:
            module.register_forward_hook(lambda *_: None)
    return whole


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which steps made a weight, in order."""
    from rewriter.parametrizations._adapters import Lora

    found: list[str] = []
    value = Lora.value
    monkeypatch.setattr(Lora, "value", lambda step, X: (found.append(f"{step.rows}x{step.columns}"), value(step, X))[1])
    return found


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("shape", [(5, 144), (3, 5, 144), (2, 3, 2, 144), (0, 144), (0, 5, 144)], ids=str)
def test_values_and_gradients_are_those_of_the_whole_weight(capture: str, shape: tuple[int, ...]) -> None:
    new, x = _rewritten(capture), torch.randn(shape, dtype=torch.float64)
    for ours, whole in zip(_gradients(new, x), _gradients(_whole(new), x), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("capture", CAPTURES)
def test_no_weight_is_made_in_training_where_one_layer_uses_it(capture: str, made: list[str]) -> None:
    new = _rewritten(capture)
    made.clear()
    _gradients(new, torch.randn(5, 144, dtype=torch.float64))
    shared = [] if capture == "module" else ["144x144"]
    assert made == shared  # a graph knows that the last layer is called twice
    with torch.no_grad():
        new(torch.randn(5, 144, dtype=torch.float64))
    assert sorted(made[len(shared) :]) == ["144x144", "144x160", "160x144"]


@pytest.mark.parametrize("capture", CAPTURES)
def test_double_backward(capture: str) -> None:
    new, x = _rewritten(capture), torch.randn(5, 144, dtype=torch.float64)

    def penalty(model: nn.Module, x: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return gradient.square().sum()

    for ours, whole in zip(_gradients(new, x, penalty), _gradients(_whole(new), x, penalty), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("capture", CAPTURES)
def test_checkpointed(capture: str, reentrant: bool) -> None:
    new, x = _rewritten(capture), torch.randn(5, 144, dtype=torch.float64)

    def again(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant).square().mean()

    def gradients(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor | None]:
        loss(model, x.clone().requires_grad_()).backward()
        return [parameter.grad for parameter in model.parameters()]

    for ours, whole in zip(gradients(new, again), gradients(copy.deepcopy(_whole(new)), _loss), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_is_as_near_as_the_whole_weight(capture: str, dtype: torch.dtype) -> None:
    """Under autocast, and with a base in bfloat16 whose factors are float32."""
    exact, half = _rewritten(capture), _rewritten(capture, dtype)
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())  # the same numbers
    x = torch.randn(64, 144, dtype=dtype)
    with torch.autocast("cpu", enabled=dtype == torch.float32):
        ours, whole = half(x), _whole(half)(x)
    assert ours.dtype == whole.dtype
    truth = exact(x.double())
    assert (ours.double() - truth).norm() < 1.5 * (whole.double() - truth).norm()


@pytest.mark.parametrize("capture", CAPTURES)
def test_dropout_in_training_makes_the_weight_once(capture: str, made: list[str]) -> None:
    new, x = _rewritten(capture, lora_dropout=0.5), torch.randn(5, 144, dtype=torch.float64)
    made.clear()
    _gradients(new, x)
    assert sorted(made) == ["144x144", "144x160", "160x144"]
    made.clear()
    _gradients(new.eval(), x)
    assert "160x144" not in made


@pytest.mark.parametrize("capture", CAPTURES)
def test_frozen_sites_and_one_value_for_several_forwards(capture: str, made: list[str]) -> None:
    new, x = _rewritten(capture), torch.randn(5, 144, dtype=torch.float64)
    expected = _gradients(_whole(new), x)
    made.clear()
    with evaluate_once(new):
        torch.testing.assert_close(_gradients(new, x), expected)
        torch.testing.assert_close(new(x).square().mean().detach(), expected[0])
    assert sorted(made) == ["144x144", "144x160", "160x144"]
    freeze(new)
    made.clear()
    torch.testing.assert_close(_loss(new, x), expected[0])
    _loss(new, x)
    assert len(made) <= 3
    unfreeze(new)
    torch.testing.assert_close(_gradients(new, x), expected)


def test_trained_bases_and_high_ranks_make_the_weight(made: list[str]) -> None:
    x = torch.randn(5, 144, dtype=torch.float64)
    for new in (_rewritten("graph", r=64), _rewritten("graph")):
        new.get_parameter("first.parametrizations.weight.original").requires_grad_(True)
        made.clear()
        _gradients(new, x)
        assert "160x144" in made


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("part", ["", ".0"], ids=["site", "step"])
def test_a_forward_that_was_set_on_a_site_or_a_step_runs(capture: str, part: str, made: list[str]) -> None:
    new, x = _rewritten(capture), torch.randn(5, 144, dtype=torch.float64)
    expected = new(x)
    hooked = new.get_submodule(f"first.parametrizations.weight{part}")
    forward, calls = hooked.forward, []
    hooked.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    made.clear()
    torch.testing.assert_close(new(x), expected)
    assert (calls, made.count("160x144")) == ([1], 1)


def test_a_weight_with_another_use_is_made(made: list[str]) -> None:
    class Penalised(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).sum() + self.first.weight.square().sum()

    new = rewrite(Penalised().double(), _spec(), capture="graph")
    assert "apart" not in print_graph(new).split("evaluate first.weight")[1].splitlines()[0]
    made.clear()
    new(torch.randn(5, 144, dtype=torch.float64)).backward()
    assert made == ["160x144"]


@pytest.mark.parametrize("capture", CAPTURES)
def test_after_steps_that_nothing_trains(capture: str, made: list[str]) -> None:
    """A base that is pruned or quantized first: its value is cached, and the change acts on the input."""
    torch.manual_seed(0)
    chain = [{"n_m": {"n": 2, "m": 4}}, {"lora": {"r": 2}}]
    rule = {"name": "r", "select": "first.weight", "chain": chain}
    new = rewrite(_Net().double(), {"reparam": 1, "rules": [rule]}, capture=capture)
    base = new.get_parameter("first.parametrizations.weight.original")
    base.requires_grad_(False)
    nn.init.normal_(new.get_parameter("first.parametrizations.weight.1.lora_B"))
    x = torch.randn(5, 144, dtype=torch.float64)
    for _ in range(2):
        made.clear()
        ours = _gradients(new, x)
        assert made == []
        for one, whole in zip(ours, _gradients(_whole(new), x), strict=True):
            torch.testing.assert_close(one, whole, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            base.mul_(2)
    base.requires_grad_(True)
    made.clear()
    assert len(_gradients(new, x)) == len(ours) + 1
    assert made == ["160x144"]


def test_the_pass_can_be_left_out_and_copies_keep_it() -> None:
    new = _rewritten("graph")
    assert print_graph(new).count("[base and change apart]") == 2
    torch.manual_seed(0)
    assert "apart" not in print_graph(rewrite(_Net(), _spec(), without=["apart"]))
    x = torch.randn(5, 144, dtype=torch.float64)
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        torch.testing.assert_close(other(x), new(x))
    torch.testing.assert_close(bake(new)(x), new(x))


@pytest.mark.parametrize("capture", CAPTURES)
def test_under_transforms_and_by_the_graph_of_another(capture: str) -> None:
    new, x = _rewritten(capture), torch.randn(5, 144, dtype=torch.float64)
    trained = {name: parameter for name, parameter in new.named_parameters() if parameter.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(new, parameters, (x,)).square().mean()

    ours = torch.func.grad(loss)(trained)
    _, _, *expected = _gradients(new, x)
    torch.testing.assert_close([*ours.values()], expected)
    if capture == "graph":
        torch.testing.assert_close(torch.fx.Interpreter(new).run(x), new(x))


def test_compiled_and_exported(made: list[str]) -> None:
    """torch.compile traces it without a break; an exported program has the whole weight, which bake finds again."""
    new, x = _rewritten("graph"), torch.randn(5, 144, dtype=torch.float64)
    expected = _gradients(new, x)
    made.clear()
    compiled = torch.compile(new, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(_gradients(compiled, x), expected)
    assert made == ["144x144"]
    made.clear()
    torch.export.export(new, (x,))
    assert "160x144" in made


@pytest.mark.slow
def test_a_language_model_computes_what_peft_computes() -> None:
    """The forward and backward of a rewritten Llama have the operations of PEFT's, and not one product more."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 144, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
    rule = {"name": "a", "select": "**.{q,v}_proj.weight", "chain": [{"lora": {"r": 4, "lora_alpha": 8}}]}
    ours = rewrite(copy.deepcopy(base), {"reparam": 1, "trainable": "rewritten", "rules": [rule]})
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    tokens = torch.randint(0, 50, (2, 16))
    counted = []
    for model in (ours, theirs):
        with FlopCounterMode(display=False) as counter:
            model(input_ids=tokens, labels=tokens).loss.backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]
