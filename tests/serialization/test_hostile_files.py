"""Crafted files run no code: each attack ends in a message, and nothing is compiled before a file is vetted."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from hostile import Call, Script, canary, graph, graph_module, node, replaced, with_state, write
from torch import fx, nn

import rewriter
from rewriter.bindings import RewrittenModule
from rewriter.errors import ModelFileError, printable
from rewriter.io import load_model, save_model
from rewriter.serialization import restore_graph_module, structure_from_text

RELU = nn.functional.relu
CALLS_FC = graph(node("call_module", "y", "fc", {"node": "x"}))


def refused(obj, path, match, **options):
    write(obj, path)
    with canary(), pytest.raises(ModelFileError, match=match):
        load_model(path, **options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def test_a_crafted_graph_that_is_harmless_loads(path):
    write(graph_module(CALLS_FC, fc=nn.Linear(2, 3)), path)
    assert load_model(path)(torch.ones(1, 2)).shape == (1, 3)


@pytest.mark.parametrize("entry", [None, RELU, 3], ids=["none", "function", "number"])
def test_a_module_replaced_after_the_graph_is_refused(path, entry):
    state = vars(nn.ModuleDict({"fc": nn.Linear(2, 2)})).copy()
    made = Call(restore_graph_module, "Crafted", CALLS_FC, state)
    later = Script(state["_modules"], "fc", entry, b"s")  # sets an item of what is in the file already
    refused(with_state(nn.Sequential(nn.ReLU()), note=[made, later]), path, r"not allowed there|damaged")


def test_state_changed_after_it_was_given_is_vetted(path):
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "0.weight", "chain": ["symmetric"]}]}
    new = rewriter.rewrite(nn.Sequential(nn.Linear(2, 2)), spec)
    rebuild, arguments, state = new.__reduce__()
    late = [Call(rebuild, *arguments, state=state), Script(state, "forward", RELU, b"s")]
    write(with_state(nn.Sequential(nn.ReLU()), note=late), path)
    read = load_model(path).note[0]
    assert isinstance(read, RewrittenModule)
    assert "forward" not in vars(read)  # it has its own copy of the state, which was vetted
    refused(Call(rebuild, *arguments, state={**state, "forward": RELU}), path, "replaces its method 'forward'")
    refused(Call(rebuild, *arguments, state={**state, "_code": "x"}), path, "code of its graph")


@pytest.mark.parametrize(
    "target",
    ["fc.reset_parameters.__globals__", "fc.__class__", "fc.reset_parameters", "fc.weight.data", "fc.note", "__dict__"],
)
def test_targets_resolve_through_modules_and_tensors_alone(path, target):
    layer = with_state(nn.Linear(2, 2), note=torch.ones(2))
    for op in ("get_attr", "call_module"):
        refused(graph_module(graph(node(op, "y", target)), fc=layer), path, "not allowed there")


def test_an_attribute_in_front_of_a_module_is_refused(path):
    layer = nn.Linear(2, 2)
    layer.__dict__["weight"] = torch.ones(2)
    refused(graph_module(graph(node("get_attr", "y", "fc.weight")), fc=layer), path, "not allowed there")
    refused(graph_module(graph(node("call_module", "y", "train")), train=layer), path, "not allowed there")


def test_a_module_is_no_argument(path):
    nodes = [node("get_attr", "m", "fc"), node("call_function", "y", "torch.relu", {"list": [{"node": "m"}]})]
    refused(graph_module(graph(*nodes), fc=nn.Linear(2, 2)), path, "is given the module 'fc'")
    nodes[1] = node("call_method", "y", "to", {"node": "m"}, "cpu")
    refused(graph_module(graph(*nodes), fc=nn.Linear(2, 2)), path, "is given the module 'fc'")


@pytest.mark.parametrize("name", ["self", "torch"])
def test_names_that_generated_code_reads_are_refused(path, name):
    refused(graph_module(graph(node("call_function", name, "torch.relu", {"node": "x"}))), path, "is no name")
    data = {"version": 1, "nodes": [node("placeholder", "x", name), node("output", "output", "output", {"node": "x"})]}
    refused(graph_module(data), path, "not allowed there")


@pytest.mark.parametrize("function", ["builtins.max", "builtins.min", "builtins.map", "builtins.sorted"])
def test_functions_that_call_their_arguments_are_refused(path, function):
    refused(graph_module(graph(node("call_function", "y", function, {"node": "x"}))), path, "may call")


@pytest.mark.parametrize("function", [restore_graph_module, RELU, nn.functional.gelu])
def test_a_function_object_that_is_not_the_user_s_is_refused(path, function):
    entry = node("call_function", "y", {"function": function}, {"node": "x"})
    refused(graph_module(graph(entry)), path, "no function of the user's own")


STATES = {
    "forward": ({"forward": RELU}, "replaces its method 'forward'"),
    "extra_repr": ({"extra_repr": RELU}, "replaces its method 'extra_repr'"),
    "hook": ({"_forward_hooks": {0: RELU}}, "_forward_hooks.0 is .*relu"),
    "module as hook": ({"_forward_pre_hooks": {0: nn.ReLU()}}, "_forward_pre_hooks.0 is a ReLU"),
    "state dict hook": ({"_state_dict_hooks": {0: RELU}}, "_state_dict_hooks.0"),
    "own function": ({"activation": restore_graph_module}, "activation is rewriter.*restore_graph_module"),
    "nested": ({"note": {"deep": [(restore_graph_module,)]}}, "note.deep is rewriter.*restore_graph_module"),
    "module that is none": ({"_modules": {"a": RELU}}, "_modules is damaged"),
    "buffer that is none": ({"_buffers": {"a": 3}}, "_buffers is damaged"),
    "tables that are none": ({"_parameters": []}, "_parameters is damaged"),
}


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("place", ["root", "child", "beside a graph"])
def test_state_that_is_no_plain_data_is_refused(path, case, place):
    state, message = STATES[case]
    layer = with_state(nn.Linear(2, 2), **state)
    refused(
        {"root": layer, "child": nn.Sequential(nn.ReLU(), layer), "beside a graph": graph_module(CALLS_FC, fc=layer)}[
            place
        ],
        path,
        message,
    )


def test_hooks_of_a_tensor_are_refused(path):
    layer = nn.Linear(2, 2)
    layer.weight.note = restore_graph_module
    refused(layer, path, "weight.note is rewriter")


def test_a_hook_that_the_user_allows_loads(path, user):
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(user.hook)
    write(layer, path)
    loaded = load_model(path, allow=["their_nets.hook", "torch.utils.hooks.RemovableHandle"])
    assert list(loaded._forward_hooks.values()) == [user.hook]


def test_an_activation_of_torch_s_loads(path):
    write(nn.TransformerEncoderLayer(8, 2, activation=nn.functional.gelu), path)
    assert load_model(path).activation is nn.functional.gelu


@pytest.mark.parametrize(
    "made",
    [
        Call(fx.GraphModule, nn.Linear(2, 2), nn.Linear(2, 2)),
        Call(fx.GraphModule.__new__, fx.GraphModule),
        Call(RewrittenModule, nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)),
        Script(fx.GraphModule, (), b"\x81"),
    ],
    ids=["constructor", "new", "rewritten", "opcode"],
)
def test_a_graph_module_is_made_from_data_alone(path, made):
    refused(made, path, r"graph module|classes or functions|cannot be read")
    refused(
        nn.Sequential(nn.ReLU(), with_state(nn.ReLU(), note=made)),
        path,
        r"graph module|classes or functions|cannot be read",
    )


def test_a_module_in_a_checkpoint_is_vetted_too(path):
    layer = with_state(nn.Linear(2, 2), forward=RELU)
    refused({"model": layer, "epoch": 3}, path, "model replaces its method 'forward'", key="model")


def test_nothing_is_compiled_before_a_file_is_vetted(path, monkeypatch):
    compiled = []
    recompile = fx.GraphModule.recompile
    monkeypatch.setattr(fx.GraphModule, "recompile", lambda self: compiled.append(self) or recompile(self))
    good = graph_module(CALLS_FC, fc=nn.Linear(2, 2))
    refused([good, restore_graph_module], path, "restore_graph_module")
    refused(nn.Sequential(nn.ReLU(), with_state(nn.ReLU(), note=good, forward=RELU)), path, "replaces")
    assert not compiled
    write(good, path)
    load_model(path)
    assert compiled


def test_a_module_that_contains_itself_is_refused(path):
    layer = nn.Sequential(nn.ReLU())
    layer._modules["1"] = layer
    refused(layer, path, "contains itself")


def test_a_command_of_this_package_is_not_imported(path, monkeypatch):
    content = write(nn.Sequential(nn.ReLU()), path).read_bytes()
    for name in (b"rewriter.cli.__main__\nmain", b"rewriter.demo\nrun", b"rewriter.cli._app\napp"):
        path.write_bytes(replaced(content, lambda data, name=name: data.replace(
            b"torch.nn.modules.activation\nReLU", name)))  # fmt: skip
        with pytest.raises(ModelFileError, match=name.replace(b"\n", b".").decode()):
            load_model(path)


def test_names_from_a_file_are_escaped(path):
    content = write(nn.Sequential(nn.ReLU()), path).read_bytes()
    hidden = "torch.evil\nReLU\x1b[2K\r\u202etorch.nn.Linear".encode()
    path.write_bytes(replaced(content, lambda data: data.replace(b"torch.nn.modules.activation\nReLU", hidden)))
    with pytest.raises(ModelFileError) as error:
        load_model(path)
    assert r"--allow 'torch.evil.ReLU\u001b[2K\r\u202etorch.nn.Linear'" in str(error.value)
    assert all(mark.isprintable() or mark == "\n" for mark in str(error.value))


def test_printable_text_stays_valid_in_json():
    text = json.dumps({"name": "a\x9b\u202e\x1b\n\U000e0041b"}, ensure_ascii=False)
    assert json.loads(printable(text)) == json.loads(text)
    assert printable("größe ≥ 3") == "größe ≥ 3"


@pytest.mark.parametrize(
    "text",
    [
        '[1, {"type": "collections.defaultdict", "context": {"default_factory_module": "this"}, "children_spec": []}]',
        '[1, {"type": "collections.\\u0064efaultdict", "context": "{}", "children_spec": []}]',
        '[1, {"type": "builtins.dict", "context": "[{\\"__\\\\u0065num__\\": \\"this:c\\"}]", "children_spec": []}]',
    ],
)
def test_a_structure_that_imports_is_refused(text):
    with canary(), pytest.raises(ModelFileError, match="names a module to import"):
        structure_from_text(text)


def test_a_structure_of_torch_s_comes_back():
    value = {"a": (1, [2]), "b": 3}
    leaves, spec = torch.utils._pytree.tree_flatten(value)
    text = torch.utils._pytree.treespec_dumps(spec)
    assert torch.utils._pytree.tree_unflatten(leaves, structure_from_text(text)) == value


def _deep(levels):
    model = nn.Linear(2, 2)
    for _ in range(levels):
        model = nn.Sequential(model)
    return model


def _with_a_deep_stack(function):
    import sys

    limit = sys.getrecursionlimit()
    before = threading.stack_size(512 * 2**20)
    sys.setrecursionlimit(200_000)
    try:
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()
    finally:
        sys.setrecursionlimit(limit)
        threading.stack_size(before)


def test_modules_nested_too_deeply_give_a_message(path):
    model = _deep(1500)
    with pytest.raises(ModelFileError, match="nested 1501 deep"):
        save_model(model, path)
    assert not path.exists()
    _with_a_deep_stack(lambda: torch.save(model, path))
    with pytest.raises(ModelFileError, match="nested 1501 deep"):
        load_model(path)


def test_modules_nested_in_the_usual_way_load(path):
    save_model(_deep(90), path)
    assert load_model(path)(torch.ones(1, 2)).shape == (1, 2)


def test_data_nested_too_deeply_gives_a_message(path):
    nested: object = {"node": "x"}
    for _ in range(1500):
        nested = {"list": [nested]}
    crafted = graph_module(graph(node("call_function", "y", "torch.relu", nested)))
    _with_a_deep_stack(lambda: write(crafted, path))
    with pytest.raises(ModelFileError, match=r"damaged|nested"):
        load_model(path)
