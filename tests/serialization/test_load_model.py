"""Reading model files: what loads as it is, what has to be allowed, and what every bad file is told."""

from __future__ import annotations

import contextlib
import pickle
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from rewriter.errors import ModelFileError
from rewriter.io import load_model, save_model

TORCH_MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.1)),
    "cnn": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten()),
    "lstm": lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, activation="gelu"), 2),
    "embedding": lambda: nn.ModuleDict({"embed": nn.Embedding(5, 4), "list": nn.ModuleList([nn.GELU()])}),
}


@pytest.mark.parametrize("name", TORCH_MODELS)
def test_modules_of_torch_classes_load_without_trust(name, tmp_path):
    model = TORCH_MODELS[name]()
    torch.save(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert type(loaded) is type(model)
    assert list(loaded.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_reading_leaves_the_process_s_list_of_safe_names_alone(tmp_path):
    torch.serialization.add_safe_globals([nn.ReLU])
    before = torch.serialization.get_safe_globals()
    torch.save(TORCH_MODELS["mlp"](), tmp_path / "model.pt")
    load_model(tmp_path / "model.pt")
    assert set(torch.serialization.get_safe_globals()) == set(before)
    torch.serialization.clear_safe_globals()


def test_a_user_class_is_refused_with_every_name_and_the_flags(user, tmp_path):
    torch.save(user.Holder(user.Net(), user.Bomb()), tmp_path / "model.pt")
    with pytest.raises(ModelFileError) as refused:
        load_model(tmp_path / "model.pt")
    text = str(refused.value)
    for name in ("their_nets.Net", "their_nets.Holder", "their_nets.fire"):
        assert f"  {name}\n" in text
        assert f"--allow {name}" in text
    assert "--trust" in text
    assert "torch.nn.modules.linear.Linear" not in text
    assert user.fired == []


def test_an_allowed_class_loads(user, tmp_path):
    torch.save(user.Net(), tmp_path / "model.pt")
    model = load_model(tmp_path / "model.pt", allow=["their_nets.Net"])
    assert type(model) is user.Net
    assert model.tied is model.fc
    assert type(load_model(tmp_path / "model.pt", allow=["their_nets.*"])) is user.Net


def test_allowing_one_name_does_not_allow_the_next(user, tmp_path):
    torch.save(user.Holder(user.Bomb()), tmp_path / "model.pt")
    with pytest.raises(ModelFileError, match=r"their_nets\.fire"):
        load_model(tmp_path / "model.pt", allow=["their_nets.Holder"])
    assert user.fired == []


def test_trust_runs_what_the_file_says(user, tmp_path):
    torch.save(user.Holder(user.Bomb()), tmp_path / "model.pt")
    load_model(tmp_path / "model.pt", trust=True)
    assert user.fired == ["boom"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_form_of_pickle_runs_code(user, tmp_path, legacy, protocol):
    torch.save(
        user.Bomb(),
        tmp_path / "model.pt",
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=protocol,
    )
    with pytest.raises(ModelFileError, match=r"their_nets\.fire" if protocol == 2 else "operand"):
        load_model(tmp_path / "model.pt")
    assert user.fired == []


def test_names_of_functions_under_torch_nn_are_refused(tmp_path):
    class Reach:
        def __init__(self, function):
            self.function = function

        def __reduce__(self):
            return self.function, ("os",)

    for function in (torch.nn.utils.clip_grad_norm_, torch.nn.init.kaiming_uniform_, torch.hub.load, eval):
        torch.save(Reach(function), tmp_path / "model.pt")
        with pytest.raises(ModelFileError, match="uses classes or functions"):
            load_model(tmp_path / "model.pt")


def test_modules_in_the_old_format_need_trust_and_weights_do_not(tmp_path, user):
    torch.save(TORCH_MODELS["mlp"](), tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelFileError, match=r"old format.* without --trust"):
        load_model(tmp_path / "model.pt")
    assert isinstance(load_model(tmp_path / "model.pt", trust=True), nn.Sequential)
    torch.save(user.make().state_dict(), tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    assert isinstance(load_model(tmp_path / "weights.pt", model=user.make), nn.Sequential)


def test_a_graph_module_saved_by_torch_says_that_it_is_code(tmp_path):
    torch.save(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), tmp_path / "model.pt")
    with pytest.raises(ModelFileError, match=r"reduce_graph_module.*allowing this runs it"):
        load_model(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_load_into_what_the_factory_makes(user, tmp_path, suffix):
    model = user.make()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    for factory in ("their_nets:make", user.make):
        loaded = load_model(path, model=factory)
        assert torch.equal(loaded[0].weight, model[0].weight)


def test_a_checkpoint_with_its_state_dict_inside_loads(user, tmp_path):
    model = user.make()
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "checkpoint.pt")
    assert torch.equal(load_model(tmp_path / "checkpoint.pt", model=user.make)[0].bias, model[0].bias)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (None, "--model package.module:factory"),
        ("their_nets", "package.module:factory, not 'their_nets'"),
        ("their_nets:", "package.module:factory, not"),
        ("nowhere.at_all:make", "cannot be imported"),
        ("their_nets:missing", "their_nets has no 'missing'"),
        ("their_nets:not_callable", "is an int, not something that makes a model"),
        ("their_nets:fire.__name__", "no 'fire.__name__'|not something that makes"),
        ("a b:c", "no name of the form"),
    ],
)
def test_a_wrong_factory_is_an_error_that_says_what_is_wrong(user, tmp_path, factory, message):
    torch.save(user.make().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path / "weights.pt", model=factory)


def test_weights_of_another_model_name_the_keys(user, tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelFileError, match=r"do not fit the model: Missing key.*0\.weight"):
        load_model(tmp_path / "weights.pt", model="their_nets:make")


def test_a_whole_module_needs_no_factory(user, tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ModelFileError, match="leave the model factory out"):
        load_model(tmp_path / "model.pt", model="their_nets:make")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a model"),
        ({"a": 1}, "keys 'a', which is no state dict"),
        (torch.ones(2), "holds a single tensor"),
        ({}, "no state dict"),
        ("text", "holds a str"),
    ],
    ids=repr,
)
def test_a_file_without_a_model_says_what_it_holds(tmp_path, content, message):
    torch.save(content, tmp_path / "thing.pt")
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path / "thing.pt")


def test_torchscript_archives_are_recognised(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "scripted.pt")
    with pytest.raises(ModelFileError, match="TorchScript archive"):
        load_model(tmp_path / "scripted.pt")


def _write(path, what):
    whole = path.with_suffix(".whole")
    torch.save(nn.Linear(4, 4), whole)
    if what == "directory":
        path.mkdir()
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "garbage":
        path.write_bytes(b"this is no model at all" * 10)
    elif what == "truncated":
        path.write_bytes(whole.read_bytes()[:-400])
    elif what == "truncated legacy":
        torch.save(nn.Linear(4, 4), whole, _use_new_zipfile_serialization=False)
        path.write_bytes(whole.read_bytes()[:300])
    elif what == "legacy without weights":
        torch.save(nn.Linear(4, 4), whole, _use_new_zipfile_serialization=False)
        path.write_bytes(whole.read_bytes()[:-20])
    elif what == "plain pickle":
        path.write_bytes(pickle.dumps([1, 2]))
    elif what == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif what == "compressed zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    elif what == "short safetensors":
        path.write_bytes(b"\xff\xff\0\0\0\0\0\0{")
    elif what == "pt2 without a program":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/archive_format", "pt2")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "does not exist"),
        ("directory", "is a directory"),
        ("empty", "is empty"),
        ("garbage", "no model file"),
        ("truncated", "damaged or cut off"),
        ("truncated legacy", "cannot be read"),
        ("legacy without weights", "cannot be read"),
        ("plain pickle", "plain pickle"),
        ("other zip", "none that torch.save wrote"),
        ("compressed zip", "compressed"),
        ("short safetensors", "cannot be read as safetensors"),
        ("pt2 without a program", "--trust"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, what, message):
    _write(tmp_path / "model.pt", what)
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path / "model.pt")


def test_a_length_beyond_all_memory_is_damage(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x02\x96" + (2**62).to_bytes(8, "little"))
    with pytest.raises(ModelFileError, match="damaged"):
        load_model(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_end_in_a_model_file_error(tmp_path, data):
    path = tmp_path / "model.pt"
    legacy = data.draw(st.booleans())
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=not legacy)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 700) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(ModelFileError):
        load_model(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\x10\0\0\0\0\0\0\0{"]),
    rest=st.binary(max_size=200),
)
def test_random_bytes_end_in_a_model_file_error(tmp_path, start, rest):
    (tmp_path / "model.pt").write_bytes(start + rest)
    with pytest.raises(ModelFileError):
        load_model(tmp_path / "model.pt")


def test_a_saved_graph_module_comes_back(tmp_path, user):
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.2), nn.Tanh()))
    module.note = {"made": "by hand"}
    module.eval()
    save_model(module, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert isinstance(loaded, fx.GraphModule)
    assert loaded.code == module.code
    assert type(loaded).__name__ == type(module).__name__
    assert (loaded.training, loaded.note) == (False, {"made": "by hand"})
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), module(x))


def test_a_graph_module_of_an_exported_program_comes_back(tmp_path):
    module = torch.export.export(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), (torch.ones(2, 4),)).graph_module
    save_model(module, tmp_path / "graph.pt")
    assert load_model(tmp_path / "graph.pt").code == module.code


def test_a_graph_that_calls_the_user_s_function_needs_leave(tmp_path, user):
    module = nn.Sequential(fx.symbolic_trace(user.Squashing()), nn.ReLU())
    save_model(module, tmp_path / "model.pt")
    with pytest.raises(ModelFileError, match=r"--allow their_nets\.squash[ \n]"):
        load_model(tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt", allow=["their_nets.squash"])
    assert torch.equal(loaded(torch.ones(2)), torch.full((2,), 0.5))


def test_a_file_of_another_version_is_recognised(tmp_path, monkeypatch):
    class Former(nn.Linear):
        pass

    Former.__module__, Former.__qualname__ = "rewriter.runtime", "Former"
    monkeypatch.setitem(sys.modules, "rewriter.runtime", SimpleNamespace(Former=Former))
    torch.save(Former(2, 2), tmp_path / "old.pt")
    monkeypatch.delitem(sys.modules, "rewriter.runtime")
    with pytest.raises(ModelFileError, match=r"rewriter\.runtime\.Former   \(of another version of reparam: "):
        load_model(tmp_path / "old.pt")
