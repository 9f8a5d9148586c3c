"""Calls of transformers become calls of their parts: masks, modes, hooks, copies, and the way back."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from rewriter import bake, plan, rewrite
from rewriter.passes import print_graph
from rewriter.sites import HANDED, ParametrizedTensor


class Symmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X / 2 + X.flip(0) / 4


class Encoding(nn.Module):
    """An encoder, or one of its layers, under masks that may be left out."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        return self.out(self.encoder(x, mask, src_key_padding_mask=padding))


class Decoding(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        return self.decoder(x, memory, tgt_mask=mask, memory_key_padding_mask=padding)


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 6, **{"batch_first": True, "dropout": 0.0, **options})


def decoder_layer(**options: Any) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(4, 2, 6, **{"batch_first": True, "dropout": 0.0, **options})


def encoder(**options: Any) -> nn.TransformerEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer(**options), 2, nn.LayerNorm(4))


SELECT = "**.{in_proj_weight,linear1.weight,norm1.bias,norm.weight}"


def spec_of(select: Any = SELECT, **options: Any) -> dict[str, Any]:
    return {"reparam": 1, "rules": [{"name": "r", "select": select, "chain": [Symmetric()], "init": "raw", **options}]}


def with_torch(model: nn.Module, spec: dict[str, Any]) -> nn.Module:
    reference = copy.deepcopy(model)
    for site in plan(model, spec):
        path, _, tensor = site.name.rpartition(".")
        parametrize.register_parametrization(reference.get_submodule(path), tensor, Symmetric())
    return reference


def pair(model: nn.Module, spec: dict[str, Any] | None = None) -> tuple[nn.Module, nn.Module]:
    """The rewritten model and torch's own, in double precision."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    spec = spec or spec_of()
    return rewrite(model, spec), with_torch(model, spec)


def gradients(model: nn.Module, *args: Any) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(*args)
    (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(new: nn.Module, reference: nn.Module, *args: Any) -> None:
    torch.testing.assert_close(new(*args), reference(*args), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(new, *args), gradients(reference, *args), rtol=1e-10, atol=1e-10)


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 4).sin()
CAUSAL = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
PADDED = torch.tensor([[False, False, True], [False, False, False]])
SCATTERED = torch.tensor([[False, True, False], [False, False, False]])
MASKS: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "causal": (CAUSAL, None),
    "boolean": (CAUSAL.isinf(), None),
    "padding": (None, PADDED),
    "float padding": (None, torch.zeros(2, 3, dtype=torch.float64).masked_fill(PADDED, float("-inf"))),
    "scattered padding": (None, SCATTERED),
    "both": (CAUSAL.isinf(), PADDED),
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [layer, encoder])
def test_masks_that_may_be_left_out_give_what_torch_gives(
    make: Callable[..., nn.Module], training: bool, masks: str
) -> None:
    new, reference = pair(Encoding(make()).train(training))
    assert_equal(new, reference, X, *MASKS[masks])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("make", [layer, encoder])
def test_without_gradients_the_values_are_those_of_the_fused_kernel(
    make: Callable[..., nn.Module], masks: str, mode: Any
) -> None:
    new, reference = pair(Encoding(make()).eval())
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        torch.testing.assert_close(new(X, *MASKS[masks]), reference(X, *MASKS[masks]), rtol=1e-10, atol=1e-10)


def test_padding_is_left_as_it_is_where_torch_packs_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)
    new, reference = pair(Encoding(stack).eval())
    with torch.no_grad():
        torch.testing.assert_close(new(X, None, PADDED), reference(X, None, PADDED), rtol=1e-10, atol=1e-10)
        new, reference = pair(Encoding(encoder()).eval())
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            torch.testing.assert_close(new(X, None, PADDED), reference(X, None, PADDED), rtol=1e-10, atol=1e-10)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


OPTIONS: list[dict[str, Any]] = [
    {"norm_first": True}, {"activation": "gelu"}, {"activation": F.silu}, {"activation": nn.GELU("tanh")},
    {"bias": False}, {"batch_first": False}, {"dropout": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("make", [lambda **o: Encoding(encoder(**o)), lambda **o: Encoding(layer(**o))])
def test_every_option_of_an_encoder_is_respected(make: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    select = SELECT if options.get("bias", True) else "**.{in_proj_weight,linear1.weight,norm1.weight}"
    new, reference = pair(make(**options), spec_of(select))
    assert {site.capture for site in plan(make(**options), spec_of(select))} == {"opened"}
    for training in (True, False):
        torch.manual_seed(1)
        found = gradients(new.train(training), X)
        torch.manual_seed(1)
        torch.testing.assert_close(found, gradients(reference.train(training), X), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "causal", "padding", "both"])
def test_a_decoder_gives_what_torch_gives(norm_first: bool, masks: str) -> None:
    stack = nn.TransformerDecoder(decoder_layer(norm_first=norm_first), 2, nn.LayerNorm(4))
    new, reference = pair(Decoding(stack))
    assert_equal(new, reference, X, X.cos(), *MASKS[masks])


def test_a_transformer_gives_what_torch_gives_and_checks_what_it_checks() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Transformer(4, 2, 1, 2, 6, 0.0, batch_first=True)

        def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            return self.model(x, y, tgt_mask=mask, tgt_is_causal=True, src_key_padding_mask=None)

    new, reference = pair(Host())
    assert_equal(new, reference, X.cos(), X, CAUSAL)
    for model in (new, reference):
        with pytest.raises(RuntimeError, match="batch number of src and tgt"):
            model(X[:1], X, CAUSAL)
        with pytest.raises(RuntimeError, match="feature number of src and tgt"):
            model(X[..., :2], X, CAUSAL)


def test_inputs_without_a_batch() -> None:
    new, reference = pair(Encoding(encoder()))
    assert_equal(new, reference, X[0], CAUSAL)


def test_a_layer_called_twice_is_evaluated_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    new, reference = pair(Twice())
    assert_equal(new, reference, X)
    sites = [node for node in new.graph.nodes if "parametrizations" in str(node.target)]
    assert len(sites) == 3
    assert print_graph(bake(rewrite(fx.symbolic_trace(Twice()), spec_of()))).count("layer(") == 2


def test_hooks_on_parts_fire_and_the_rest_is_opened() -> None:
    model = Encoding(encoder())
    seen: list[str] = []
    block = model.encoder.layers[0]
    block.linear1.register_forward_hook(lambda m, args, out: (seen.append("linear1"), out * 2)[1])
    block.dropout.register_forward_pre_hook(lambda m, args: seen.append("dropout"))
    block.linear2.register_full_backward_hook(lambda m, given, out: seen.append("backward"))
    new, reference = pair(model)
    assert {site.name: site.capture for site in plan(model, spec_of("encoder.layers.*.linear1.weight"))} == {
        "encoder.layers.0.linear1.weight": "handed",
        "encoder.layers.1.linear1.weight": "opened",
    }
    seen.clear()
    gradients(new, X)
    assert seen == ["linear1", "dropout", "backward"]
    assert_equal(new, reference, X)
    assert list(bake(new).encoder.layers[0].linear1._forward_hooks) == list(block.linear1._forward_hooks)


@pytest.mark.parametrize("path", ["encoder", "encoder.layers.1"])
def test_a_hook_on_a_transformer_itself_keeps_it_one_call(path: str) -> None:
    model = Encoding(encoder())
    seen: list[str] = []
    model.get_submodule(path).register_forward_hook(lambda m, args, out: (seen.append(path), out + 1)[1])
    new, reference = pair(model)
    found = {site.name: (site.capture, site.why) for site in plan(model, spec_of("**.linear1.weight"))}
    assert found["encoder.layers.1.linear1.weight"][0] == "handed"
    assert "has hooks" in found["encoder.layers.1.linear1.weight"][1]
    assert found["encoder.layers.0.linear1.weight"][0] == ("handed" if path == "encoder" else "opened")
    seen.clear()
    new(X)
    assert seen == [path]
    assert_equal(new, reference, X)


class Scaled(nn.TransformerEncoderLayer):
    """A subclass with a forward of its own: not what is known of the layer."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(src, *args, **kwargs)


@pytest.mark.parametrize("odd", [Scaled(4, 2, 6, 0.0, batch_first=True), layer(activation=lambda x: x.sin())])
def test_a_layer_that_is_not_known_is_handed_its_tensors(odd: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack = nn.TransformerEncoder(odd, 2, nn.LayerNorm(4))
    new, reference = pair(Encoding(stack))
    captures = {site.name.split(".")[1]: site.capture for site in plan(Encoding(stack), spec_of())}
    assert captures == {"layers": "handed", "norm": "opened"}
    assert_equal(new, reference, X, None, PADDED)


def test_parts_that_were_replaced_are_called_as_they_are() -> None:
    model = Encoding(layer())
    model.encoder.linear1 = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
    model.encoder.norm2 = nn.RMSNorm(4)
    model.encoder.activation = nn.PReLU()
    spec = spec_of("encoder.{norm2.weight,activation.weight,linear2.weight,linear1.1.weight}")
    new, reference = pair(model, spec)
    assert_equal(new, reference, X)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("make", [layer, encoder])
@pytest.mark.parametrize("grad", [True, False])
def test_an_unbaked_encoder_scripts_and_gives_the_same(make: Callable[..., nn.Module], masks: str, grad: bool) -> None:
    new, _ = pair(Encoding(make()).eval())
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(new)
        torch.testing.assert_close(scripted(X, *MASKS[masks]), new(X, *MASKS[masks]), rtol=1e-12, atol=1e-12)


def test_an_unbaked_transformer_and_decoder_script() -> None:
    new, _ = pair(Decoding(nn.TransformerDecoder(decoder_layer(), 2)).eval())
    torch.testing.assert_close(torch.jit.script(new)(X, X, CAUSAL), new(X, X, CAUSAL), rtol=1e-12, atol=1e-12)
    new, _ = pair(Decoding(nn.Transformer(4, 2, 1, 1, 6, batch_first=True)).eval(), spec_of("**.linear1.weight"))
    torch.testing.assert_close(torch.jit.script(new)(X, X), new(X, X), rtol=1e-12, atol=1e-12)


def structure(model: nn.Module) -> list[Any]:
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return [modules, list(model.state_dict()), [(n, p.requires_grad) for n, p in model.named_parameters()]]


@pytest.mark.parametrize("mode", ["graph", "module"])
def test_bake_gives_back_classes_and_keys(mode: str) -> None:
    model = Encoding(encoder())
    new = rewrite(model, spec_of(), capture=mode)
    baked = bake(new)
    assert structure(baked) == structure(model)
    torch.testing.assert_close(baked(X.float()), new(X.float()))
    assert structure(bake(new, keep="original")) == structure(model)
    torch.testing.assert_close(bake(new, keep="original")(X.float()), model(X.float()))


def test_a_graph_gets_its_calls_back() -> None:
    plain = fx.symbolic_trace(Encoding(encoder()))
    new = rewrite(plain, spec_of())
    assert not any(node.target == "encoder" for node in new.graph.nodes)
    baked = bake(new)
    assert str(baked.graph) == str(plain.graph)
    assert baked.code == plain.code
    assert [node.name for node in baked.graph.nodes] == [node.name for node in plain.graph.nodes]


def test_what_is_baked_in_part_becomes_one_call_again() -> None:
    new, reference = pair(Encoding(encoder()))
    some = bake(new, only=["encoder.layers.1.**", "encoder.norm.**"])
    called = {node.target for node in some.graph.nodes if node.op == "call_module"}
    assert {"encoder.layers.1", "encoder.norm"} <= called
    assert "encoder" not in called and "encoder.layers.0" not in called
    torch.testing.assert_close(some(X, CAUSAL, PADDED), reference(X, CAUSAL, PADDED), rtol=1e-10, atol=1e-10)
    assert structure(bake(some)) == structure(bake(new))
    torch.testing.assert_close(bake(some)(X), reference(X), rtol=1e-10, atol=1e-10)


def test_a_second_rewriting_expands_what_is_left() -> None:
    model = Encoding(encoder()).double()
    first = rewrite(model, spec_of("encoder.layers.0.linear1.weight"))
    assert any(node.target == "encoder.layers.1" for node in first.graph.nodes)
    both = spec_of(["encoder.layers.*.linear1.weight", "out.weight"])
    more = spec_of(["encoder.layers.1.linear1.weight", "out.weight"])
    new = rewrite(first, more)
    assert not any(HANDED in node.kwargs for node in new.graph.nodes)
    assert_equal(new, with_torch(model, both), X, CAUSAL)
    assert structure(bake(new)) == structure(model)


@pytest.mark.parametrize(
    ("make", "path", "first", "then"),
    [
        (lambda: Encoding(encoder()), "encoder", "encoder.layers.0.linear1.weight", "encoder.layers.0.linear2.weight"),
        (lambda: Encoding(encoder()), "out", "out.weight", "out.bias"),
    ],
)
def test_a_second_rewriting_opens_what_lost_its_hooks(make: Any, path: str, first: str, then: str) -> None:
    model = make().double()
    handle = model.get_submodule(path).register_forward_hook(lambda *_: None)
    new = rewrite(model, spec_of(first))
    assert any(HANDED in node.kwargs for node in new.graph.nodes)
    handle.remove()
    new.get_submodule(path)._forward_hooks.clear()
    new = rewrite(new, spec_of(then))
    assert not any(HANDED in node.kwargs for node in new.graph.nodes)
    assert_equal(new, with_torch(model, spec_of([first, then])), X, CAUSAL)
    assert structure(bake(new)) == structure(model)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda new: loaded(new)])
def test_copies_and_files_keep_the_way_back(again: Callable[[Any], Any]) -> None:
    new, reference = pair(fx.symbolic_trace(Encoding(encoder())))
    other = again(new)
    assert_equal(other, reference, X, None, None)
    baked = bake(other)
    assert [node.target for node in baked.graph.nodes if node.op == "call_module"] == ["encoder", "out"]
    assert not any(isinstance(module, ParametrizedTensor) for module in baked.modules())


def loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_autocast_gives_what_torch_gives() -> None:
    new, reference = pair(Encoding(encoder()))
    new, reference, x = new.float(), reference.float(), X.float()
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = new.train(training)(x), reference.train(training)(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_policies_that_decide_at_run_time_hold_inside() -> None:
    for cache in ("never", "version"):
        new, reference = pair(Encoding(encoder()), spec_of(cache=cache))
        assert_equal(new, reference, X, CAUSAL)
