"""Files of checkpoints with the prefixes of wrappers, and of averages, loaded into a rewritten model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from rewriter import RewriterError
from rewriter.io import load_model
from rewriter.state import convert_state_dict
from tests.state.conftest import Net
from tests.state.test_bridged_loads import X, old


@pytest.mark.filterwarnings("ignore:removed the prefix")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("form", ["plain", "rewritten", "old", "pruned"])
def test_a_file_with_a_prefix_is_loaded(
    rewritten: Callable[..., nn.Module], prefix: str, form: str, suffix: str, tmp_path: Path
) -> None:
    source: nn.Module = rewritten("weight_norm") if form == "rewritten" else Net().double()
    if form in ("old", "pruned"):
        old("weight_norm" if form == "old" else "prune", source.get_submodule("first"))
    state = {prefix + key: value.clone() for key, value in source.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pt" else save_file)(state, path)
    new = load_model(path, model=lambda: rewritten("weight_norm"))
    torch.testing.assert_close(new(X), source(X))


@pytest.mark.filterwarnings("ignore:removed the prefix")
def test_the_state_of_an_average_is_loaded(rewritten: Callable[..., nn.Module], tmp_path: Path) -> None:
    average = AveragedModel(rewritten("weight_norm"), use_buffers=True)
    average.update_parameters(rewritten("weight_norm"))
    average.update_parameters(rewritten("weight_norm"))
    state = average.state_dict()
    torch.save(state, tmp_path / "average.pt")
    into, plain = rewritten("weight_norm"), Net().double()
    into.load_state_dict(state)
    plain.load_state_dict(convert_state_dict(state, into, to="plain"))
    loaded = load_model(tmp_path / "average.pt", model=lambda: rewritten("weight_norm"))
    around = load_model(tmp_path / "average.pt", model=lambda: AveragedModel(rewritten("weight_norm")))
    for model in (into, plain, loaded, around):
        torch.testing.assert_close(model(X), average(X))
    assert around.n_averaged == 2
    assert list(convert_state_dict(state, average, to="rewritten")) == list(state)


def test_a_prefix_beside_the_name_without_it_stays(tmp_path: Path) -> None:
    state = Net().state_dict()
    torch.save({**state, "module.scale": state["scale"] + 1}, tmp_path / "weights.pt")
    with pytest.raises(RewriterError, match=r"module\.scale"):
        load_model(tmp_path / "weights.pt", model=Net)
