"""Graphs as data: lossless for what models contain, closed to everything that is not a tensor function."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
from torch import fx, nn

from rewriter.errors import ModelFileError
from rewriter.serialization import graph_from_data, graph_function, graph_to_data


class Everything(nn.Module):
    """Uses each kind of node and most kinds of argument."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.cell = nn.RNNCell(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 7))
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, tokens: torch.Tensor, gain: float = 1.5, *rest: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(tokens)
        state = x.new_zeros(x.shape[0], 4)
        for step in range(3):
            state = self.cell(x[:, step], state)
        state = nn.functional.linear(state * self.scale + self.shift, self.head[0].weight) * gain
        state = state.to(torch.float64).to(torch.float32)
        folded = torch.einsum("bi,bi->b", state, state)[..., None]
        pooled = nn.functional.max_pool2d(state[None, None], 1, stride=(1, 1))[0, 0]
        top = torch.max(pooled, dim=1, keepdim=True).values
        parts = torch.cat([pooled, top], dim=-1)
        norm = torch.linalg.vector_norm(parts, ord=float("inf"), dim=-1, keepdim=True)
        ramp = torch.arange(4, dtype=torch.float32, device=torch.device("cpu"))
        return {"out": self.head(state) + folded + norm, "ramp": ramp, "slice": parts[:, 1:-1:2]}


def _round_trip(module: fx.GraphModule) -> fx.GraphModule:
    data = pickle.loads(pickle.dumps(graph_to_data(module.graph)))
    return fx.GraphModule(module, graph_from_data(data, module))


def test_a_graph_comes_back_with_equal_code_names_and_outputs():
    module = fx.symbolic_trace(Everything())
    back = _round_trip(module)
    assert back.code == module.code
    assert [node.name for node in back.graph.nodes] == [node.name for node in module.graph.nodes]
    assert [node.target for node in back.graph.nodes] == [node.target for node in module.graph.nodes]
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for name, value in module(tokens).items():
        assert torch.equal(back(tokens)[name], value)
    assert torch.equal(back(tokens, gain=2.0)["out"], module(tokens, gain=2.0)["out"])


@pytest.mark.parametrize("factory", [nn.Linear, nn.Conv2d, nn.Bilinear], ids=lambda factory: factory.__name__)
def test_inlined_torch_leaves_come_back(factory):
    arguments = {nn.Linear: (3, 3), nn.Conv2d: (3, 3, 1), nn.Bilinear: (2, 3, 4)}[factory]

    class Opening(fx.Tracer):
        def is_leaf_module(self, m, qualname):
            return False

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = factory(*arguments)

        def forward(self, *inputs):
            return self.inner(inputs[0])

    root = Root() if factory is not nn.Bilinear else factory(*arguments)
    module = fx.GraphModule(root, Opening().trace(root))
    assert _round_trip(module).code == module.code


def test_an_exported_aten_graph_comes_back():
    program = torch.export.export(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (torch.randn(2, 3),))
    names = [entry["target"] for entry in graph_to_data(program.graph)["nodes"] if entry["op"] == "call_function"]
    assert names == ["torch.ops.aten.linear.default", "torch.ops.aten.relu.default"]
    back = graph_from_data(graph_to_data(program.graph), nn.Module())
    assert str(back) == str(program.graph)


def test_nested_arguments_come_back():
    class Nested(nn.Module):
        def forward(self, pair, options):
            return {"sum": pair[0] + options["scale"], "both": [pair[1], None]}

    leaf = fx.PH
    module = fx.symbolic_trace(Nested(), concrete_args={"pair": (leaf, leaf), "options": {"scale": leaf}})
    back = _round_trip(module)
    assert back.code == module.code
    x = torch.ones(2)
    assert torch.equal(back((x, x), {"scale": x})["sum"], x + x)


@pytest.mark.parametrize(
    "signature",
    [
        {"names": ["a; import os"], "inputs": {"tuple": []}, "outputs": None},
        {"names": ["a"], "inputs": {"namedtuple": ["leaf"]}, "outputs": None},
        {"names": ["a"], "inputs": {"dict": [[("a",), "leaf"]]}, "outputs": None},
        {"names": ["a"], "inputs": {"dict": [1]}, "outputs": None},
        {"names": None, "inputs": "leaf", "outputs": None},
        {"names": [], "inputs": 3, "outputs": None},
        [],
    ],
    ids=repr,
)
def test_signatures_that_are_no_plain_nesting_are_refused(signature):
    with pytest.raises(ModelFileError):
        graph_from_data({"version": 1, "nodes": [], "signature": signature}, nn.Module())


def test_own_meta_comes_back_and_foreign_meta_does_not():
    module = fx.symbolic_trace(nn.ReLU())
    node = list(module.graph.nodes)[1]
    node.meta["reparam"] = {"site": "fc.weight", "uses": (1, 2), "shape": [None, 3.5, True]}
    node.meta["val"] = torch.ones(1)
    back = list(graph_from_data(graph_to_data(module.graph), module).nodes)[1]
    assert back.meta["reparam"] == {"site": "fc.weight", "uses": (1, 2), "shape": [None, 3.5, True]}
    assert "val" not in back.meta


def test_names_that_torch_would_number_again_survive():
    graph = fx.Graph()
    x = graph.placeholder("x")
    late = graph.create_node("call_function", torch.relu, (x,), name="relu_7")
    early = graph.create_node("call_function", torch.relu, (late,), name="relu_2")
    graph.output(early)
    assert str(graph_from_data(graph_to_data(graph), nn.Module())) == str(graph)


def test_a_user_function_stays_a_reference_for_pickle():
    graph = fx.Graph()
    graph.output(graph.call_function(copy.copy, (graph.placeholder("x"),)))
    data = graph_to_data(graph)
    assert data["nodes"][1]["target"] == {"function": copy.copy}
    assert list(graph_from_data(data, nn.Module()).nodes)[1].target is copy.copy


def test_a_function_without_a_name_cannot_be_stored():
    graph = fx.Graph()
    graph.output(graph.call_function(lambda x: x, (graph.placeholder("x"),)))
    with pytest.raises(ModelFileError, match="module-level"):
        graph_to_data(graph)


def test_a_tensor_among_the_arguments_cannot_be_stored():
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.add, (x, 1))
    node.meta["reparam"] = torch.ones(1)
    graph.output(node)
    with pytest.raises(ModelFileError, match="no plain data"):
        graph_to_data(graph)


def test_own_functions_are_stored_by_name_once_registered(monkeypatch):
    from rewriter.serialization import _functions

    monkeypatch.setattr(_functions, "_registered", {})
    graph = fx.Graph()
    graph.output(graph.call_function(graph_to_data, (graph.placeholder("x"),)))
    assert graph_to_data(graph)["nodes"][1]["target"] == {"function": graph_to_data}
    graph_function(graph_to_data)
    data = graph_to_data(graph)
    assert data["nodes"][1]["target"] == "rewriter.serialization._graph_data:graph_to_data"
    assert list(graph_from_data(data, nn.Module()).nodes)[1].target is graph_to_data


def _stored(op: str, target: object, args: list[object] | None = None, name: str = "evil") -> dict[str, object]:
    nodes = [
        {"op": "placeholder", "name": "x", "target": "x", "args": [], "kwargs": {}},
        {"op": op, "name": name, "target": target, "args": args or [{"node": "x"}], "kwargs": {}},
    ]
    return {"version": 1, "nodes": nodes}


REFUSED_FUNCTIONS = [
    "",
    *"""
    torch.load torch.save torch.hub.load torch.from_file torch._VF.from_file torch.frombuffer torch.compile
    torch.import_ir_module torch.nn.functional.boolean_dispatch torch.ops.load_library torch.ops.aten.save
    torch.ops.aten.save.default torch.ops.aten.from_file torch.ops.aten.from_file.default
    torch.ops.aten.__class__ torch.ops.aten.add.__class__ torch.ops.mylib.add.default torch.serialization.load
    torch.storage._load_from_bytes torch.utils.model_zoo.load_url os.system os:system posix.system
    subprocess:run builtins.eval builtins.exec builtins.__import__ builtins.open builtins.setattr builtins.print
    operator.attrgetter operator.methodcaller operator.call operator.delitem importlib:import_module
    rewriter.serialization._functions:importlib.import_module rewriter.serialization._graph_data:graph_from_data
    rewriter.nowhere:f . torch builtins.max builtins.min builtins.map
    torch.nn.functional.triplet_margin_with_distance_loss
    """.split(),
]


@pytest.mark.parametrize("name", REFUSED_FUNCTIONS)
def test_functions_that_do_not_compute_on_tensors_are_refused(name):
    with pytest.raises(ModelFileError, match="no function that a model file may call"):
        graph_from_data(_stored("call_function", name), nn.Module())


@pytest.mark.parametrize(
    "name",
    [
        *("", "x y", "x()"),
        *"""
        numpy tofile apply_ map_ register_hook __class__ __reduce_ex__ _make_subclass data_ptr share_memory_
        format storage untyped_storage register_forward_hook eval map2_ set_ record_stream backward module_load
        __getitem__ apply
        """.split(),
    ],
)
def test_methods_other_than_public_tensor_methods_are_refused(name):
    with pytest.raises(ModelFileError, match="not allowed there"):
        graph_from_data(_stored("call_method", name), nn.Module())


@pytest.mark.parametrize(
    "args",
    [
        [{"node": "x"}, "__class__"],
        [{"node": "x"}, "numpy"],
        [{"node": "x"}, "tofile"],
        [{"node": "x"}, "_base"],
        [{"node": "x"}, "grad_fn"],
        [{"node": "x"}, {"node": "x"}],
        [{"node": "x"}, "shape.__class__"],
        [{"node": "x"}],
    ],
)
def test_getattr_reads_only_tensor_properties(args):
    with pytest.raises(ModelFileError, match="reads the attribute"):
        graph_from_data(_stored("call_function", "builtins.getattr", args), nn.Module())


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "a b",
        "a\nimport os",
        "x); import os; (",
        "import",
        "a.b",
        "",
        None,
        3,
        "\uff41",
        "__import__('os')",
    ],
)
def test_node_names_that_would_become_code_are_refused(name):
    with pytest.raises(ModelFileError, match="no name or not unique"):
        graph_from_data(_stored("call_function", "torch.relu", name=name), nn.Module())


@pytest.mark.parametrize("op", ["get_attr", "call_module"])
@pytest.mark.parametrize(
    "target", ["missing", "fc.weight.data", "fc.__class__", "fc.forward", 'fc"]; import os; ["', ""]
)
def test_targets_that_are_not_in_the_module_tree_are_refused(op, target):
    owner = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    with pytest.raises(ModelFileError, match="not allowed there"):
        graph_from_data(_stored(op, target), owner)


@pytest.mark.parametrize("target", ["x, y=__import__('os').system('true')", "x=1", "import", "***x", "", 3])
def test_placeholders_that_would_become_code_are_refused(target):
    with pytest.raises(ModelFileError):
        graph_from_data(_stored("placeholder", target), nn.Module())


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(object(), id="object"),
        {"node": "later"},
        {"dtype": "load"},
        {"dtype": "float32.x"},
        {"device": "__import__"},
        {"what": 1},
        {"layout": "float32"},
        {"slice": [1, 2]},
        {"range": ["a"]},
        [1],
        (1,),
        {"a": 1, "b": 2},
        {"ellipsis": {}, "x": 1},
    ],
    ids=repr,
)
def test_values_that_are_no_plain_data_are_refused(value):
    data = _stored("call_function", "torch.relu", [value])
    if value == {"slice": [1, 2]}:
        assert graph_from_data(data, nn.Module()) is not None
        return
    with pytest.raises(ModelFileError):
        graph_from_data(data, nn.Module())


@pytest.mark.parametrize(
    "data", [None, [], {}, {"version": 99, "nodes": []}, {"version": 1}, {"version": 1, "nodes": [1]}]
)
def test_data_of_another_form_is_refused(data):
    with pytest.raises(ModelFileError):
        graph_from_data(data, nn.Module())


def test_a_class_cannot_stand_in_for_a_function():
    with pytest.raises(ModelFileError, match="is no function"):
        graph_from_data(_stored("call_function", {"function": nn.Linear}), nn.Module())


def test_operator_targets_keep_their_identity():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.getitem, (x, (slice(None), ..., 0))))
    assert list(graph_from_data(graph_to_data(graph), nn.Module()).nodes)[1].target is operator.getitem
