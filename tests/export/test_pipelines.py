"""Tools of torch after bake, on graphs with computed tensors, and the one line where they need bake first."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

import rewriter
from rewriter.errors import RewriterError

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def _rewritten(chain="spectral_norm", capture="graph"):
    torch.manual_seed(0)
    model = Net()
    model.bn.running_mean.normal_(), model.bn.running_var.uniform_(1, 2)
    rules = [
        {"name": "c", "select": "conv.weight", "reshape": ["out", -1], "chain": [chain]},
        {"name": "f", "select": "fc.weight", "chain": [chain]},
    ]
    return rewriter.rewrite(model.eval(), {"reparam": 1, "rules": rules}, capture=capture)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("capture", ["graph", "module"])
def test_bake_then_fuse_conv_bn(capture):
    new = _rewritten(capture=capture)
    baked = rewriter.bake(new)
    baked.conv, baked.bn = fuse_conv_bn_eval(baked.conv, baked.bn), nn.Identity()
    torch.testing.assert_close(baked(X), new(X))


def test_bake_then_quantize_dynamic(quiet):
    new = _rewritten()
    quantized = torch.ao.quantization.quantize_dynamic(rewriter.bake(new), {nn.Linear}, dtype=torch.qint8)
    assert type(quantized.fc).__module__.startswith("torch.ao.nn.quantized")
    torch.testing.assert_close(quantized(X), new(X), atol=0.02, rtol=0.02)


def test_bake_then_prepare_fx(quiet):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    new = _rewritten()
    mapping = get_default_qconfig_mapping("x86")
    results = []
    for model in (rewriter.bake(new), _plain(new)):
        prepared = prepare_fx(model, mapping, (X,))
        prepared(X)
        results.append(convert_fx(prepared)(X))
    torch.testing.assert_close(*results)  # as a model that never was rewritten


def _plain(new):
    """A model that never was rewritten, with the values."""
    plain = Net().eval()
    plain.load_state_dict(rewriter.bake(new).state_dict())
    return plain


@pytest.mark.slow
def test_bake_then_pt2e(quiet):
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizers = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = quantizers.X86InductorQuantizer()
    quantizer.set_global(quantizers.get_default_x86_inductor_quantization_config())
    new, results = _rewritten(), []
    for model in (rewriter.bake(new), _plain(new)):
        prepared = pt2e.prepare_pt2e(torch.export.export(model, (X,)).module(), quantizer)
        prepared(X)
        results.append(pt2e.convert_pt2e(prepared)(X))
    torch.testing.assert_close(*results)


def test_bake_then_sparsify():
    pruning = pytest.importorskip("torch.ao.pruning")
    baked = rewriter.bake(_rewritten())
    sparsifier = pruning.WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1))
    sparsifier.prepare(baked, [{"tensor_fqn": "fc.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert int((baked.fc.weight == 0).sum()) == 8


def test_bake_is_a_pass_over_graphs():
    graph = fx.symbolic_trace(Net().eval())
    rule = {"name": "f", "select": "fc.weight", "chain": ["spectral_norm"]}
    new = rewriter.rewrite(graph, {"reparam": 1, "rules": [rule]})
    passes = fx.passes.infra.pass_manager.PassManager(
        [lambda module: fx.passes.infra.pass_base.PassResult(rewriter.bake(module), True)]
    )
    baked = passes(new).graph_module
    torch.testing.assert_close(baked(X), new(X))
    assert str(baked.graph) == str(graph.graph)


def test_shapes_are_propagated_through_a_rewritten_graph():
    new = _rewritten()
    ShapeProp(new).propagate(X)
    shapes = {node.name: node.meta["tensor_meta"].shape for node in new.graph.nodes if "tensor_meta" in node.meta}
    assert torch.Size([2, 4]) in shapes.values()
    torch.testing.assert_close(rewriter.bake(new)(X), new(X))


def test_an_interpreter_runs_a_rewritten_graph():
    new = _rewritten()
    torch.testing.assert_close(fx.Interpreter(new).run(X), new(X))


def test_a_rewritten_graph_is_split():
    new = _rewritten()
    nodes = {node: index for index, node in enumerate(new.graph.nodes)}
    parts = split_module(new, new, lambda node: int(nodes[node] > len(nodes) // 2))
    torch.testing.assert_close(parts(X), new(X))
    assert len([name for name, _ in parts.named_children() if name.startswith("submod")]) == 2


def test_flops_are_those_of_the_plain_model_and_of_the_chains():
    def flops(model):
        with FlopCounterMode(display=False) as counter:
            model(X)
        return counter.get_total_flops()

    new = _rewritten("weight_norm")
    assert flops(new) == flops(rewriter.bake(new)) > 0


def test_the_profiler_names_the_operations_of_a_chain():
    new = _rewritten()
    for model, chain in ((new, True), (rewriter.bake(new), False)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(X)
        names = {event.key for event in profile.key_averages()}
        assert "aten::conv2d" in names
        assert ("aten::mv" in names) is chain


@pytest.mark.parametrize("capture", ["graph", "module"])
def test_tools_that_need_plain_tensors_say_bake_first(quiet, capture):
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat, quantize_dynamic
    from torch.package import PackageExporter

    new = _rewritten(capture=capture)

    def package():
        with PackageExporter(io.BytesIO()) as exporter:
            exporter.extern("**")
            exporter.save_pickle("model", "model.pkl", new)

    def qat():
        trained = copy.deepcopy(new).train()
        trained.qconfig = get_default_qat_qconfig("x86")
        prepare_qat(trained)

    tools = {
        r"torch\.ao\.quantization of the Linear": lambda: quantize_dynamic(new, {nn.Linear}),
        r"torch\.ao\.quantization of the Conv2d": qat,
        r"torch\.package": package,
    }
    if capture == "module":
        tools[r"torch\.jit\.script"] = lambda: torch.jit.script(new)
    for name, tool in tools.items():
        with pytest.raises(RewriterError, match=f"{name} .*spectral_norm is computed: bake first"):
            tool()
    torch.testing.assert_close(new(X), rewriter.bake(new)(X))


@pytest.mark.parametrize("chain", ["spectral_norm", "orthogonal"])
def test_aot_autograd_gives_the_gradients_of_eager(chain):
    from functorch.compile import aot_module, nop

    new = _rewritten(chain).train()
    compiled = aot_module(copy.deepcopy(new), nop)
    new(X).square().sum().backward()
    compiled(X).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in new.named_parameters()}
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name.removeprefix("orig_module.")], atol=1e-4, rtol=1e-4)


class Wide(nn.Module):
    """With layers of the sizes that torchao takes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["graph", "module"])
def test_torchao_quantizes_after_bake_and_says_bake_first_before(quiet, capture):
    torchao = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
    rule = {"name": "f", "select": "first.weight", "chain": ["spectral_norm"]}
    x = torch.randn(3, 64)
    for config, tolerance in (
        (torchao.Int8WeightOnlyConfig(), 0.02),
        (torchao.Int8DynamicActivationInt8WeightConfig(), 0.05),
        (qat.QATConfig(weight_config=weights, step="prepare"), 0.5),
    ):
        new = rewriter.rewrite(Wide().eval(), {"reparam": 1, "rules": [rule]}, capture=capture)
        wanted = new(x)
        baked = rewriter.bake(new)
        torchao.quantize_(baked, config)
        assert "torchao" in type(baked.first.weight).__module__ + type(baked.first).__module__
        torch.testing.assert_close(baked(x), wanted, atol=tolerance, rtol=tolerance)
        # For training, torchao makes a layer of its own, which takes parameters alone.
        with pytest.raises((RewriterError, TypeError), match=r"bake first|Parameter or None expected") as refused:
            torchao.quantize_(new, config)
        assert isinstance(refused.value, TypeError) is isinstance(config, qat.QATConfig)


def test_prepare_fx_before_bake_works_on_a_graph_alone(quiet):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    new, mapping = _rewritten(), get_default_qconfig_mapping("x86")
    torch.testing.assert_close(prepare_fx(copy.deepcopy(new), mapping, (X,))(X), new(X))
    with pytest.raises(RewriterError, match=r"conv\.weight cannot be set"):  # it fuses the batch norm
        prepare_fx(_rewritten(capture="module"), mapping, (X,))
