"""Every member of the catalog, baked, in every format that other programs run."""

from __future__ import annotations

import pytest
import torch

from benchmarks.serving import INPUT, Stack, catalog, differences, families, nodes_of, plain_of, rewritten
from rewriter import bake
from tests.members import members


def test_the_stack_has_the_whole_catalog():
    assert catalog() == members()
    assert sorted(name for family in families().values() for name in family) == sorted(members())


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torchscript", "pt2", "onnx", pytest.param("aoti", marks=pytest.mark.timeout(900))])
@pytest.mark.filterwarnings("ignore")
def test_every_baked_member_gives_the_values_of_the_rewritten_model(tmp_path, format):
    pytest.importorskip("onnxruntime") if format == "onnx" else None
    new = rewritten(catalog())
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    baked = bake(new)
    torch.testing.assert_close(baked(INPUT), new(INPUT), atol=1e-5, rtol=1e-5)
    assert max(differences(baked, format, tmp_path)) <= 1e-5
    assert all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in baked.state_dict(keep_vars=True).values()
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in new.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_baked_export_has_the_operations_of_the_plain_model():
    new = rewritten(catalog())
    assert nodes_of(bake(new)) == nodes_of(plain_of(new))


@pytest.mark.parametrize("name", ["orthogonal", "spectral_norm", "weight_norm", "lora"])
def test_a_baked_member_is_one_operation(name):
    new = rewritten([name])
    assert nodes_of(bake(new)) == nodes_of(Stack([name])) == 2
    assert nodes_of(new) > 4
