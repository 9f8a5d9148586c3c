"""PEFT's LoRA layers are taken over: the adapters' parameters stay, the wrappers go."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from torch import nn

import rewriter

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(16, 3)
        self.cls = nn.Linear(3, 2)

    def forward(self, i):
        hidden = self.fc(self.emb(i))
        return self.cls(self.head(self.conv(hidden[:, None]).mean(2).flatten(1)))


class Experts(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 4, 6) if transposed else torch.randn(3, 6, 4))
        self.down = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        up = self.up if self.is_transposed else self.up.mT
        return (x @ up).sum(0).sum(-1, keepdim=True) * (x @ self.down)


class Moe(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        self.experts = Experts(transposed)

    def forward(self, x):
        return self.experts(x)


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["fc", "head"]},
    "saved": {"modules_to_save": ["cls"]},
}


def _adapted(**changes):
    changes = {"target_modules": ["emb", "conv", "fc", "head"], "init_lora_weights": False, **changes}
    return peft.get_peft_model(Net(), peft.LoraConfig(r=2, lora_alpha=6, **changes))


@pytest.fixture
def ids():
    return torch.randint(0, 9, (4, 5))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_outputs_and_gradients_are_the_same(config, merged, training, ids):
    model = _adapted(**CONFIGS[config]).train(training)
    if merged:
        model.merge_adapter()
    new = rewriter.absorb(model)
    torch.testing.assert_close(new(ids), model(ids), rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model(ids).square().sum().backward()
    new(ids).square().sum().backward()
    before = sorted(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
    after = sorted(float(p.grad.norm()) for p in new.parameters() if p.grad is not None)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5)


def test_the_base_model_comes_back_plain(ids):
    model = _adapted(modules_to_save=["cls"]).eval()
    expected = model(ids)
    new = rewriter.absorb(model)
    assert not any(type(module).__module__.startswith("peft") for module in new.modules())
    torch.testing.assert_close(pickle.loads(pickle.dumps(new))(ids), new(ids))
    torch.testing.assert_close(torch.export.export(new, (ids,)).module()(ids), expected)
    baked = rewriter.bake(new)
    assert type(baked) is Net
    assert vars(baked).keys() == vars(Net()).keys()
    assert list(baked.state_dict()) == list(Net().state_dict())
    torch.testing.assert_close(baked(ids), expected)
    torch.testing.assert_close(torch.jit.script(baked)(ids), expected)
    undone = rewriter.bake(new, keep="original")
    assert torch.equal(undone.fc.weight, model.base_model.model.fc.base_layer.weight)


@pytest.mark.parametrize("own", [False, True])
def test_a_model_of_transformers_saves_itself_whole_again(own, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=8)
    model, ids = transformers.GPT2LMHeadModel(config), torch.randint(0, 9, (2, 5))
    lora = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True, init_lora_weights=False
    )  # its weights are transposed
    if own:
        model.add_adapter(lora)
    else:
        model = peft.get_peft_model(model, lora)
    model.eval()
    expected = model(input_ids=ids).logits
    new = rewriter.absorb(model)
    torch.testing.assert_close(new(input_ids=ids).logits, expected)
    new(input_ids=ids).logits.square().sum().backward()
    model(input_ids=ids).logits.square().sum().backward()
    norms = [
        sorted(float(parameter.grad.norm()) for parameter in one.parameters() if parameter.grad is not None)
        for one in (new, model)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    rewriter.bake(new).save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


def test_in_place_the_parameters_that_are_trained_stay_the_same_objects():
    model = _adapted()
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    new = rewriter.absorb(model, inplace=True)
    assert {id(parameter) for parameter in new.parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("transposed", [False, True])
def test_target_parameters_are_taken_over(transposed):
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.up", "experts.down"], init_lora_weights=False
    )
    model = peft.get_peft_model(Moe(transposed), config)
    x = torch.randn(5, 4)
    new = rewriter.absorb(model)
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-4)
    rules = {site.spec.rule for site in new.modules() if hasattr(site, "original_names")}
    assert rules == {"absorbed:peft.target_parameters"}
    torch.testing.assert_close(rewriter.bake(new)(x), model(x), rtol=1e-4, atol=1e-4)


def test_several_active_adapters_are_several_steps(ids):
    model = _adapted()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["fc"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    new = rewriter.absorb(model)
    torch.testing.assert_close(new(ids), model(ids), rtol=1e-4, atol=1e-5)
    assert "fc.parametrizations.weight.1.lora_A" in new.state_dict()


def test_a_parametrization_below_an_adapter_comes_first_in_the_chain(ids):
    net = Net()
    nn.utils.parametrizations.weight_norm(net.fc)
    config = peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False)
    model = peft.get_peft_model(net, config)
    new = rewriter.absorb(model)
    torch.testing.assert_close(new(ids), model(ids), rtol=1e-4, atol=1e-5)
    assert rewriter.bake(new).fc.weight.shape == (8, 8)


def test_what_a_weight_cannot_do_is_refused(ids):
    model = _adapted()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["fc"]))
    with pytest.raises(rewriter.PlanError, match=r"model\.fc\.weight: .*idle adapters other"):
        rewriter.absorb(model)
    with pytest.raises(rewriter.PlanError, match="bias in its LoRA"):
        rewriter.absorb(_adapted(lora_bias=True, target_modules=["fc"]))
    with pytest.warns(UserWarning, match="dropout of the adapter 'default'"):
        rewriter.absorb(_adapted(lora_dropout=0.5, target_modules=["fc", "conv"]).train())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = _adapted(lora_dropout=0.5, target_modules=["fc", "conv"]).eval()
        torch.testing.assert_close(rewriter.absorb(model)(ids), model(ids))


def test_a_selected_weight_under_an_adapter_is_refused():
    net = _adapted()
    select = {"path": "**.fc.weight"}
    spec = {"reparam": 1, "rules": [{"name": "s", "select": select, "chain": ["symmetric"]}]}
    with pytest.raises(rewriter.PlanError, match=r"fc\.weight is computed already, by peft\.lora"):
        rewriter.rewrite(net, spec)


@pytest.mark.parametrize("second", [True, False])
def test_dora_beside_another_adapter_is_refused(second):
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["fc"], use_dora=True))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["fc"], use_dora=second))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(rewriter.PlanError, match="DoRA adapters default, other"):
        rewriter.absorb(model)


def test_an_adapter_of_a_grouped_convolution_is_refused():
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.warns(UserWarning, match="groups > 1"):
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(rewriter.PlanError, match="grouped convolution"):
        rewriter.absorb(model)


def test_an_adapter_that_changes_the_bias_says_so():
    config = peft.IA3Config(target_modules=["fc"], feedforward_modules=[])
    with pytest.raises(rewriter.PlanError, match="its bias included"):
        rewriter.absorb(peft.get_peft_model(Net(), config))


@pytest.mark.parametrize("chain", ["orthogonal", "weight_norm"])
def test_merging_adapters_into_a_computed_weight_warns_at_the_line(chain, ids):
    net = Net()
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "fc.weight", "chain": [chain]}]}
    new = rewriter.rewrite(net, spec, capture="module")
    model = peft.get_peft_model(new, peft.LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False))
    with pytest.warns(UserWarning, match=r"fc\.weight was changed in place.* lost") as caught:
        model.merge_and_unload()(ids)
    assert "peft" in next(warning.filename for warning in caught if "lost" in str(warning.message))


def test_an_adapter_around_a_module_of_a_graph_is_refused(ids):
    net = Net()
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "fc.weight", "chain": ["orthogonal"]}]}
    new = rewriter.rewrite(net, spec, capture="graph")
    model = peft.get_peft_model(new, peft.LoraConfig(r=2, target_modules=["fc"]))
    with pytest.raises(rewriter.RewriterError, match=r"fc was replaced .* after the model was rewritten"):
        model(ids)
