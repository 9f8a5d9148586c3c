"""Models of the transformers library: torch.fx traces none of them, and their classes have to stay."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from rewriter import RewriterError, bake, plan, rewrite

transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

WIDTH, WORDS = 32, 40
TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def gpt2() -> Any:
    config = transformers.GPT2Config(n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=WORDS, n_positions=32, **TOKENS)
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(2, WORDS, (2, 7))}


def llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, vocab_size=WORDS, max_position_embeddings=32, **TOKENS)
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(2, WORDS, (2, 7))}


def bert() -> Any:
    config = transformers.BertConfig(**SIZES, vocab_size=WORDS, max_position_embeddings=32, pad_token_id=0)
    return transformers.BertForMaskedLM(config), {"input_ids": torch.randint(2, WORDS, (2, 7))}


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=WIDTH, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    ids = torch.randint(2, WORDS, (2, 7))
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


def vit() -> Any:
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, num_channels=1, num_labels=3)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 1, 16, 16)}


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=WORDS, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
        max_target_positions=32, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **TOKENS,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.randint(2, WORDS, (2, 5))}
    return transformers.WhisperForConditionalGeneration(config), inputs


# For each model the tied tensor, if there is one, and a pattern for matrices inside its layers.
MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "gpt2": (gpt2, "lm_head.weight", "transformer.h.*.{attn,mlp}.c_*.weight"),
    "llama": (llama, "", "model.layers.*.self_attn.*_proj.weight"),
    "bert": (bert, "cls.predictions.decoder.weight", "bert.encoder.layer.*.attention.**.{query,value}.weight"),
    "t5": (t5, "lm_head.weight", "**.{q,wo}.weight"),
    "vit": (vit, "", "**.attention.**.weight"),
    "whisper": (whisper, "proj_out.weight", "**.{q_proj,fc1}.weight"),
}
GENERATING = ("gpt2", "llama", "t5", "whisper")


class Halved(nn.Module):
    """Half the tensor, counted."""

    evaluations = 0

    def forward(self, X: Tensor) -> Tensor:
        Halved.evaluations += 1
        return X / 2


class Case:
    """A small model with random weights, an input, and the spec of weight norms on it."""

    def __init__(self, name: str, *chain: Any) -> None:
        build, tied, pattern = MODELS[name]
        self.model, self.inputs = build()
        self.model = self.model.double().eval()
        self.inputs = {
            key: value.double() if value.is_floating_point() else value for key, value in self.inputs.items()
        }
        self.chain = list(chain) or ["weight_norm"]
        rules = [{"name": "layers", "select": pattern, "chain": self.chain}]
        if tied:
            rules.append({"name": "tied", "select": tied, "chain": self.chain})
        self.spec = {"reparam": 1, "rules": rules}

    def rewritten(self) -> Any:
        return rewrite(self.model, self.spec)

    def generate(self, model: Any) -> Tensor:
        given = next(iter(self.inputs.values()))
        torch.manual_seed(0)
        tokens: Tensor = model.generate(given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        return tokens


def some(*names: str) -> Any:
    """A decoder and an encoder with a decoder by default, the other models in the slow tests."""
    return [pytest.param(name, marks=() if name in ("gpt2", "t5") else pytest.mark.slow) for name in names]


@pytest.fixture(params=some(*MODELS))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def loss_of(output: Any) -> Tensor:
    loss: Tensor = output.logits.square().mean()
    return loss


def with_torch(case: Case) -> Any:
    """The same weight norms, by torch's own mechanism."""
    reference = copy.deepcopy(case.model)
    for site in plan(case.model, case.spec):
        first: Any = None
        for name in site.names:
            owner, _, tensor = name.rpartition(".")
            module = reference.get_submodule(owner)
            parametrizations.weight_norm(module, tensor)
            held = module.parametrizations[tensor]
            first = first or held
            held.original0, held.original1 = first.original0, first.original1
    return reference


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_torch(name: str) -> None:
    case = Case(name)
    new, reference = case.rewritten(), with_torch(case)
    assert list(new.state_dict()) == list(reference.state_dict())
    new.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for one, other in zip(new.parameters(), reference.parameters(), strict=True):
            noise = 0.1 * torch.randn_like(one)
            one.add_(noise)
            other.add_(noise)
    ours, theirs = new(**case.inputs), reference(**case.inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-10)
    loss_of(ours).backward()
    loss_of(theirs).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert expected.keys() == dict(new.named_parameters()).keys()
    for name, parameter in new.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", some(*MODELS))
def test_one_evaluation_for_each_forward(name: str) -> None:
    case = Case(name, Halved())
    new = case.rewritten()
    Halved.evaluations = 0
    new(**case.inputs)
    assert Halved.evaluations == len(plan(case.model, case.spec))


def test_the_class_stays(case: Case) -> None:
    new = case.rewritten()
    kind = type(case.model)
    assert isinstance(new, kind)
    assert type(new).__name__ == kind.__name__
    assert type(new).__qualname__ == kind.__qualname__
    assert inspect.signature(new.forward) == inspect.signature(case.model.forward)
    assert (new.dtype, new.device, new.config) == (case.model.dtype, case.model.device, case.model.config)
    assert new.num_parameters() >= case.model.num_parameters()
    assert new.get_input_embeddings() is not None
    assert {*dir(case.model)} <= {*dir(new)}


@pytest.mark.parametrize("name", some(*GENERATING))
def test_generate_gives_the_same_tokens_before_and_after_bake(name: str) -> None:
    case = Case(name, Halved())
    expected_model = copy.deepcopy(case.model)
    with torch.no_grad():
        for site in plan(case.model, case.spec):
            expected_model.get_parameter(site.name).div_(2)
    new = case.rewritten()
    expected = case.generate(expected_model)
    assert torch.equal(case.generate(new), expected)
    assert torch.equal(case.generate(bake(new)), expected)


def test_bake_gives_the_model_back(case: Case, tmp_path: Path) -> None:
    new = case.rewritten()
    plain = bake(new)
    assert {type(module) for module in plain.modules()} == {type(module) for module in case.model.modules()}
    assert type(plain) is type(case.model)
    assert list(plain.state_dict()) == list(case.model.state_dict())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in case.model.named_parameters()]
    torch.testing.assert_close(plain(**case.inputs).logits, new(**case.inputs).logits, rtol=0, atol=1e-12)
    plain.save_pretrained(tmp_path)
    loaded = type(case.model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(**case.inputs).logits, plain(**case.inputs).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", some("gpt2", "bert", "t5", "whisper"))
def test_tied_weights_can_be_tied_again(name: str) -> None:
    new = Case(name).rewritten()
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    parameters = {id(parameter) for parameter in new.parameters()}
    new.tie_weights()
    assert new.state_dict().keys() == before.keys()
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert {id(p) for p in new.parameters()} == parameters
    new.init_weights()
    new.post_init()
    new.resize_token_embeddings(WORDS)
    assert new.state_dict().keys() == before.keys()
    assert {id(p) for p in new.parameters()} == parameters


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "whisper"])
def test_a_computed_embedding_is_resized_by_baking_first(name: str) -> None:
    case = Case(name)
    new = case.rewritten()
    expected = new(**case.inputs).logits
    for request in ({"new_num_tokens": WORDS + 8}, {"pad_to_multiple_of": 64}):
        with pytest.raises(RewriterError, match=r"for 40 tokens and cannot be resized to (48|64): .*bake\(model\)"):
            new.resize_token_embeddings(**request)
    torch.testing.assert_close(new(**case.inputs).logits, expected, rtol=0, atol=0)
    plain = bake(new)
    plain.resize_token_embeddings(WORDS + 8)
    assert rewrite(plain, case.spec)(**case.inputs).logits.shape[-1] == WORDS + 8


def test_an_embedding_that_is_not_computed_is_resized() -> None:
    case = Case("gpt2")
    del case.spec["rules"][1]  # type: ignore[attr-defined]
    new = case.rewritten()
    new.resize_token_embeddings(WORDS + 8)
    assert new(**case.inputs).logits.shape[-1] == WORDS + 8
    plain = bake(new)
    assert plain.lm_head.weight is plain.transformer.wte.weight
    torch.testing.assert_close(plain(**case.inputs).logits, new(**case.inputs).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_in_the_middle_of_training_goes_into_a_model_rewritten_alike(name: str, tmp_path: Path) -> None:
    case = Case(name)
    new = case.rewritten()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1)
    with pytest.warns(UserWarning, match=r"save bake\(model\)"):
        new.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    other = case.rewritten()
    found = other.load_state_dict(tensors, strict=False)
    assert not found.unexpected_keys
    stored = {tensor.data_ptr() for key, tensor in other.state_dict().items() if key in tensors}
    assert all(other.state_dict()[key].data_ptr() in stored for key in found.missing_keys)
    torch.testing.assert_close(other(**case.inputs).logits, new(**case.inputs).logits, rtol=0, atol=1e-12)


def test_copies_and_pickles_work(case: Case) -> None:
    new = case.rewritten()
    expected = new(**case.inputs).logits
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert isinstance(other, type(case.model))
        torch.testing.assert_close(other(**case.inputs).logits, expected, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.add_(0.1)
        torch.testing.assert_close(other(**case.inputs).logits, expected, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.sub_(0.1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", some("gpt2", "llama", "bert", "t5", "whisper"))
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    case = Case(name)
    new = case.rewritten()
    new.train()
    options = {"use_cache": False} if name != "bert" else {}
    torch.manual_seed(0)
    loss_of(new(**case.inputs, **options)).backward()
    expected = {name: parameter.grad for name, parameter in new.named_parameters()}
    new.zero_grad()
    new.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    loss_of(new(**case.inputs, **options)).backward()
    for key, parameter in new.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=0, atol=1e-10, msg=key)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_checkpointed_layers_are_not_evaluated_again() -> None:
    case = Case("gpt2", Halved())
    new = case.rewritten()
    new.train()
    new.gradient_checkpointing_enable({"use_reentrant": False})
    Halved.evaluations = 0
    loss_of(new(**case.inputs, use_cache=False)).backward()
    assert Halved.evaluations == len(plan(case.model, case.spec))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_exported_graph_for_train_and_eval(name: str) -> None:
    case = Case(name)
    call = {**case.inputs, "use_cache": False} if name in GENERATING else case.inputs
    new = rewrite(case.model, case.spec, capture="export", example_kwargs=call)
    reference = case.rewritten()
    for training in (True, False):
        new.train(training), reference.train(training)
        found = []
        for model in (new, reference):
            model.zero_grad()
            torch.manual_seed(3)
            output = model(**call).logits
            output.square().mean().backward()
            found.append((output.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)
    assert type(bake(new)) is type(case.model)


def test_parametrizations_of_torch_are_not_touched() -> None:
    case = Case("gpt2")
    parametrizations.weight_norm(case.model.transformer.h[0].attn.c_proj, "weight")
    case.spec["rules"][0]["except"] = "transformer.h.0.attn.**"  # type: ignore[index]
    new = case.rewritten()
    assert parametrize.is_parametrized(new.transformer.h[0].attn.c_proj)
    torch.testing.assert_close(new(**case.inputs).logits, case.model(**case.inputs).logits)
